import subprocess
import sys

import psutil
from processes import wait_until

# as training does: SIGTERM is noted, what has begun is finished, and SystemExit ends it
SCRIPT = """
import os, pathlib, signal, sys, time
from latent_dmmd.experiments.workers import in_a_process

def train(path):
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
    pathlib.Path(path + ".new").write_text(str(os.getpid()))
    os.rename(path + ".new", path)
    while not noted:
        time.sleep(0.1)
    signal.signal(signal.SIGTERM, before)
    pathlib.Path(path + ".saved").touch()
    sys.exit(0)

if __name__ == "__main__":
    in_a_process(train, sys.argv[1])
"""


def has_ended(pid):
    """Also if nobody has asked how it ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_parent_leaves_no_process(tmp_path):
    script, path = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script), str(path)])
    try:
        wait_until(path.exists, 180)
        pid = int(path.read_text())
        assert not has_ended(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: has_ended(pid), 30)
    assert path.with_suffix(".saved").exists()
