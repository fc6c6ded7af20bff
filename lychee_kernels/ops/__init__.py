# SPDX-License-Identifier: Apache-2.0
"""Public functions of the ops: arguments, documentation, fake tensors, gradients."""
