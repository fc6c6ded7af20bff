# SPDX-License-Identifier: Apache-2.0
"""Training stages; each runs from one TOML file, resumes from its own checkpoint and logs JSONL."""
