"""When this process began, but for the interpreter: imported before torch, which takes seconds."""

import time

AT = time.monotonic()
