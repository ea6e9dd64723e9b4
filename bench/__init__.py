"""Speed and memory against peers or limits in one run: `python -m bench NAME --json F`."""
