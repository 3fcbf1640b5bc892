"""The process that searches responses for a pattern, so that a search which never ends is ended.

`verifiers.format_reward` starts this file by its path, with nothing of the package imported. It
reads [pattern, [text, ...]] as JSON and writes 1 or 0 a text, a line each, at once. The kernel ends
it where it has used the seconds of processor time that it was given.
"""

import json
import re
import resource
import sys

if __name__ == "__main__":
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    pattern, texts = json.load(sys.stdin)
    search = re.compile(pattern, re.DOTALL).search
    for text in texts:
        print(int(search(text) is not None), flush=True)
