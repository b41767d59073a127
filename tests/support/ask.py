"""Ask a server to run a command in a process that it forks, and exit with its exit code.

Only the standard library is imported, so this starts at once. A job that is killed counts as 137.

Example::

    python -I tests/support/ask.py SOCKET train DIRECTORY BASE      # the server: chaos.py
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    job = {"arguments": sys.argv[2:], "environment": dict(os.environ)}
    socket.send_fds(server, [json.dumps(job).encode()], [1, 2])
    code = server.recv(8)
sys.exit(int(code) if code else 137)
