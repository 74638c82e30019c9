"""What holds for every test."""

from __future__ import annotations

import signal

# A suite started in the background of a script inherits an ignored SIGINT and would hand it on to the
# processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
