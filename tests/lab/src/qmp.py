# Asks a QEMU on /run/qmp.sock: COMMAND, its arguments as JSON, and the event that tells of the end, if one does.
import json
import socket
import sys

command, arguments, event = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
line = socket.socket(socket.AF_UNIX)
line.connect("/run/qmp.sock")
answers = line.makefile("r")


def ask(command, **arguments):
    line.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
    for text in answers:
        answer = json.loads(text)
        if "error" in answer:
            sys.exit(f"{command}: {answer['error']}")
        if "return" in answer:
            return


ask("qmp_capabilities")
ask(command, **arguments)
# The greeting, and events of other devices, come in between.
while event and json.loads(next(answers)).get("event") != event[0]:
    pass
