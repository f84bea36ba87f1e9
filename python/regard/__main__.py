"""`python -m regard info | check | bench`."""

import os
import sys

from regard._cli import main

if __name__ == "__main__":
    try:
        try:
            status = main()
        finally:
            print(end="", flush=True)  # what is left is written here, where it may fail, also where main() exits
    except BrokenPipeError:  # whoever was reading, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        status = 1
    sys.exit(status)
