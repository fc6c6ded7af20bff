# SPDX-License-Identifier: Apache-2.0
"""Evaluation: how often answers are right, by task and length of text."""
