# SPDX-License-Identifier: Apache-2.0
"""LycheeMemory: answers questions about very long texts from a compressed, reusable memory."""
