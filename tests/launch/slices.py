"""A TPU slice on this machine: its gcloud runs the commands of each host in a home folder, and fails as told."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

from launchers import CONFIG, ROOT, before, calls, environment_of, fake, launch, script

GCLOUD = r"""
S=FOLDER
kill_host() { # the processes of a host, with no chance to save
  local pid
  for pid in $(cat $S/host$1/uae_run/{pid,child} 2>/dev/null); do kill -KILL $pid 2>/dev/null; done
}
lose_host() { kill_host $1; rm -rf $S/host$1; mkdir -p $S/host$1; }
lose_all() { for i in $(cat $S/hosts); do lose_host $i; done; }
started() { # waits until the run is there on all hosts
  for i in $(cat $S/hosts); do
    until [ -e $S/host$i/uae_run/child ] && [ -e $S/starts-host$i ]; do sleep .02; done
  done
}
preempt() { lose_all; echo SUSPENDED > $S/queued; echo PREEMPTED > $S/node; }
not_found() { echo "ERROR: (gcloud) NOT_FOUND: Resource not found." >&2; exit 1; }
if [ -s $S/faults ]; then
  IFS='|' read -r pattern what < $S/faults
  if [[ "$*" == *$pattern* ]]; then sed -i 1d $S/faults; eval "$what"; fi
fi
shift 2
case "$1 $2" in
  "queued-resources describe") cat $S/queued 2>/dev/null || not_found ;;
  "queued-resources create") echo ACTIVE > $S/queued; echo READY > $S/node ;;
  "queued-resources delete") rm -f $S/queued $S/node; lose_all ;;
  "tpu-vm describe") cat $S/node 2>/dev/null || not_found ;;
  "tpu-vm scp") for i in $(cat $S/hosts); do cp "$3" $S/host$i/uae_jax.tar.gz; done ;;
  "tpu-vm ssh")
    code=0 hosts=$(cat $S/hosts)
    for word in "$@"; do case $word in --worker=0) hosts=0 ;; esac; done
    for i in $hosts; do
      (cd $S/host$i && HOME=$PWD HOSTNAME=host$i exec bash -c "${!#}") || code=$?
    done
    exit $code ;;
esac
"""
GIT = f"""case $1 in
  archive) for word in "$@"; do if [ "$last" = -o ]; then out=$word; fi; last=$word; done
    tar czf "$out" --transform 's,^,uae_jax/,' -C {ROOT} launch ;;
esac"""
UV = """case $1 in
  venv) mkdir -p .venv/bin
    printf '#!/bin/bash\\nexec bash FOLDER/main "$@"\\n' > .venv/bin/python; chmod +x .venv/bin/python ;;
esac"""
CRONTAB = """case $1 in
  -l) cat $HOME/crontab 2>/dev/null ;;
  -) cat > $HOME/crontab.new; mv $HOME/crontab.new $HOME/crontab ;;
esac"""


class Slice:
    """Two hosts of a slice that is there, unless told otherwise."""

    def __init__(self, folder: pathlib.Path, hosts: int = 2) -> None:
        self.folder, self.bin, self.workdir = folder, folder / "bin", folder / "run"
        (folder / "hosts").write_text(" ".join(map(str, range(hosts))))
        for index in range(hosts):
            (folder / f"host{index}").mkdir()
        for name, body in {"gcloud": GCLOUD, "git": GIT, "uv": UV, "crontab": CRONTAB, "sudo": "exit 1"}.items():
            fake(self.bin, name, body.replace("FOLDER", str(folder)))
        self.state("node", "READY")
        self.main("exit 0")

    def state(self, name: str, value: str) -> None:
        """What gcloud says of the `node`, or of the resource that is `queued`."""
        (self.folder / name).write_text(value + "\n")

    def main(self, body: str) -> None:
        """What the run does on each host: `$h` is the host, `$n` the number of the start there, `$S` this folder."""
        script(
            self.folder / "main",
            f"S={self.folder} h=$HOSTNAME; mkdir -p $S/run; echo x >> $S/starts-$h; n=$(wc -l < $S/starts-$h)\n"
            f'echo "start $n of $h with $*"\n{body}\n',
        )

    def faults(self, *lines: str) -> None:
        """`PART OF A CALL|COMMAND` each: gcloud runs the first command at the first call with its part, and so on."""
        (self.folder / "faults").write_text("".join(f"{line}\n" for line in lines))

    def words(self, *options: str) -> tuple[str, ...]:
        return (*options, "slice", "z", CONFIG[0], str(self.workdir))

    def launch(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        """The command that starts a run."""
        return launch("tpu_vm.sh", *self.words(*options), **before(self.bin), **environment)

    def ask(self, option: str) -> subprocess.CompletedProcess:
        return launch("tpu_vm.sh", option, "slice", "z", **before(self.bin))

    def on_host(self, index: int, *words: str) -> subprocess.CompletedProcess:
        """A command of launch/tpu_host.sh on one host."""
        home = self.folder / f"host{index}"
        return subprocess.run(
            ["bash", home / "uae_jax" / "launch" / "tpu_host.sh", *words],
            capture_output=True,
            text=True,
            env=environment_of({"HOME": str(home), "HOSTNAME": f"host{index}", **before(self.bin)}),
            timeout=60,
        )

    def starts(self, index: int) -> int:
        path = self.folder / f"starts-host{index}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def calls(self, *parts: str) -> int:
        return calls(self.bin, "gcloud", *parts)

    def faults_left(self) -> str:
        path = self.folder / "faults"
        return path.read_text() if path.exists() else ""

    def kill_host(self, index: int) -> None:
        """What the end of a host does to its processes."""
        for name in ("pid", "child"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"host{index}" / "uae_run" / name).read_text()), signal.SIGKILL)

    def running(self) -> bool:
        """Whether the run goes on on all hosts."""
        return all(
            (self.folder / f"host{index}" / "uae_run" / "child").exists() and self.starts(index) for index in range(2)
        )

    def until(self, condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "nothing happened for a minute"
            time.sleep(0.02)

    def end(self) -> None:
        """Leaves no process behind."""
        (self.folder / "go").touch()
        for index in map(int, (self.folder / "hosts").read_text().split()):
            self.kill_host(index)
