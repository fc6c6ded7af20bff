# SPDX-License-Identifier: Apache-2.0
"""`python -m lychee` is the command `lychee`."""

from lychee.cli import main

if __name__ == "__main__":
    main()
