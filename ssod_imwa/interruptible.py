"""Importing this first lets Ctrl-C end a command without a traceback while the rest is imported.

That takes seconds, and `cli.run_main` is not running yet. Until it is, SIGINT kills the process, as
SIGTERM does; `run_main` puts Python's own handler back. It also holds in the processes that a
command starts, since they import its file again.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by `&`
    signal.signal(signal.SIGINT, signal.SIG_DFL)
