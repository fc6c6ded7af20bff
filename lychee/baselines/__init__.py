# SPDX-License-Identifier: Apache-2.0
"""Other methods on the same decoder, kernels and decode settings, to compare this one with."""
