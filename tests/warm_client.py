"""What stands for `python` and `hf-offline-compress` where blocks of the documents run; see warm_server.py."""

import json
import os
import socket
import sys

arguments = sys.argv[1:]
if os.path.basename(os.environ["WARM_CALLED"]) != "python":  # noqa: PTH119 (pathlib takes its time)
    arguments = ["-m", "hf_offline_compress", *arguments]
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(os.environ["WARM_SOCKET"])
request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()  # noqa: PTH109
socket.send_fds(connection, [request], [0, 1, 2])
code = connection.recv(1)
sys.exit(code[0] if code else 1)
