# SPDX-License-Identifier: Apache-2.0
"""Tasks with known answers, hidden in real text."""
