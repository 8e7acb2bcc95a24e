"""A script that acts as a worker: it holds the lock, runs a child process, and writes its pid."""

WORKER = """
import fcntl, os, signal, subprocess, sys, time
folder, mode = sys.argv[1], os.environ.get("MODE", "")
if mode == "broken":
    print("Traceback: no module named onnx", flush=True); sys.exit(3)
if mode == "slow":
    time.sleep(1000)
if mode == "greedy":
    hoard = []
    while True:
        hoard.append(b"x" * 2**20)
lock = open(folder + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
# The child gets only the mark in its environment, like a model server, and runs in the folder.
mark = {"TIDEGATE_REPLICA": os.environ.get("TIDEGATE_REPLICA", ""), "PATH": os.environ["PATH"]}
apart = mode == "own session"
server = subprocess.Popen(["sleep", "1000"], env=mark, cwd=folder, start_new_session=apart)
def drain(*_):
    if mode != "deaf":
        server.kill() if mode != "messy" else None
        print("drained", flush=True); os._exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
# Written last, because tests wait for it.
lock.write(str(os.getpid())); lock.flush()
while True:
    time.sleep(1000)
"""
