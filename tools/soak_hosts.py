"""Shares on hosts of their own with a bucket between them: ``python tools/soak_hosts.py --rounds 10``, as root.

Each host has its own network (a namespace, joined to the others by a bridge), host name, processes and ``/tmp``; the
bucket is on another one, served by moto.  Each round all of them convert together, from the bucket into it; one is
killed (SIGKILL, with all that it runs) at a random moment and begins anew.  The objects must be those of one process,
and nothing else may be left, nor an upload that is not completed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "fixtures" / "families" / "llama" / "hf"
BRIDGE, PREFIX, NETWORK, PORT = "anyckpt0", "anyckpt", "10.77.0", 5000
FORMATS = (("megatron-core",), ("hf", "--max-shard-size", "60KB"), ("dcp",), ("nemo2",), ("megatron-core-zarr",))
SECONDS = 120
SERVER = """
import sys, time
from moto.server import ThreadedMotoServer
ThreadedMotoServer(sys.argv[1], int(sys.argv[2]), verbose=False).start()
print("up", flush=True)
time.sleep(1e6)
"""
BEGIN = 'hostname "$1"; mount -t tmpfs none /tmp; mount -t proc proc /proc; shift; exec "$@"'
"""What the first process of a host does, with the host's name and a command."""


def system(*words: str) -> None:
    """Run a command that must succeed.

    Raises:
        SystemExit: the kernel refuses; with the command and its error.
    """
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")


def space(host: int) -> str:
    """The name of a host's network namespace; host 0 has the bucket."""
    return f"{PREFIX}-{host}"


@contextmanager
def networks(hosts: int) -> Iterator[None]:
    """A network of the bucket's host and of so many others, which ends with the processes in it."""
    made = []
    try:
        system("ip", "link", "add", BRIDGE, "type", "bridge")
        made.append(("ip", "link", "del", BRIDGE))
        system("ip", "link", "set", BRIDGE, "up")
        for host in range(hosts + 1):
            name, end = space(host), f"{PREFIX}{host + 1}"
            system("ip", "netns", "add", name)
            made.append(("ip", "netns", "del", name))
            system("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
            made.append(("ip", "link", "del", end))
            system("ip", "link", "set", end, "master", BRIDGE, "up")
            system("ip", "-n", name, "address", "add", f"{NETWORK}.{host + 1}/24", "dev", "eth0")
            system("ip", "-n", name, "link", "set", "eth0", "up")
            system("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for words in reversed(made):
            subprocess.run(words, check=False)


def start(host: int, *words: str) -> subprocess.Popen[str]:
    """A command of anyckpt on a host of its own."""
    inside = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c", BEGIN, "sh", f"host{host}"]
    command = ["ip", "netns", "exec", space(host), *inside, sys.executable, "-m", "anyckpt", *words]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
        "AWS_ENDPOINT_URL": f"http://{NETWORK}.1:{PORT}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for a process, which must do its part."""
    _, error = process.communicate(timeout=SECONDS)
    if process.returncode:
        raise SystemExit(f"a process failed: {error}")


def kill(process: subprocess.Popen[str]) -> bool:
    """End a host's processes at once; whether it was at work."""
    process.send_signal(signal.SIGKILL)  # the first process of the host dies with it, and all others with that
    process.communicate()
    return process.returncode == -signal.SIGKILL


class Bucket:
    """The bucket as its own host sees it; its calls are made there."""

    def ask(self, program: str) -> Any:
        """What a program prints as JSON, which has the bucket as ``s3``, made by boto3."""
        begin = (
            "import boto3, hashlib, json\n"
            f"s3 = boto3.client('s3', endpoint_url='http://{NETWORK}.1:{PORT}', region_name='us-east-1',"
            " aws_access_key_id='key', aws_secret_access_key='secret')\n"
        )
        words = ["ip", "netns", "exec", space(0), sys.executable, "-c", begin + program]
        return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    def make(self) -> None:
        self.ask("s3.create_bucket(Bucket='models'); print(1)")

    def contents(self) -> dict[str, str]:
        """Digests of all objects by key, and uploads that are not completed."""
        found: dict[str, str] = self.ask(
            "keys = [o['Key'] for page in s3.get_paginator('list_objects_v2').paginate(Bucket='models')"
            " for o in page.get('Contents', ())]\n"
            "left = s3.list_multipart_uploads(Bucket='models').get('Uploads', ())\n"
            "digest = lambda key: hashlib.sha256(s3.get_object(Bucket='models', Key=key)['Body'].read()).hexdigest()\n"
            "print(json.dumps({**{key: digest(key) for key in keys}, **{u['Key']: 'not completed' for u in left}}))"
        )
        return found


def one_round(number: int, to: Sequence[str], hosts: int, generator: random.Random, bucket: Bucket) -> int:
    """Convert together, killing one; how many were at work when they were killed.

    Raises:
        SystemExit: the objects are not those of one process, or something is left.
    """
    words = ["convert", "s3://models/source", f"s3://models/{number}/out", "--to", *to, "--workers", "1"]
    shares = {host: [*words, "--share", f"{host}/{hosts}", "--wait", "60"] for host in range(1, hosts + 1)}
    processes = {host: start(host, *shares[host]) for host in shares}
    victim = generator.choice(list(shares))
    try:
        time.sleep(generator.uniform(0.3, 2.5))
        killed = kill(processes[victim])
        processes[victim] = start(victim, *shares[victim])
        for process in processes.values():
            ended(process)
    finally:
        for process in processes.values():
            if process.poll() is None:
                kill(process)
    there = bucket.contents()
    own = {key.partition("/")[2]: value for key, value in there.items() if key.startswith(f"{number}/")}
    alone = {key.partition("/")[2]: value for key, value in there.items() if key.startswith(f"{to[0]}/")}
    if own != alone:
        raise SystemExit(f"{to[0]}: not what one process writes: {sorted(set(own.items()) ^ set(alone.items()))}")
    return killed


def soak(rounds: int, seed: int, hosts: int, source: Path) -> dict[str, Any]:
    """Rounds one after another, and what happened in them."""
    generator, bucket = random.Random(seed), Bucket()
    kills, begun, done = 0, time.monotonic(), set()
    bucket.make()
    ended(start(1, "convert", str(source), "s3://models/source", "--to", "hf", "--max-shard-size", "100KB"))
    for number in range(rounds):
        to = FORMATS[number % len(FORMATS)]
        if to not in done:
            ended(start(1, "convert", "s3://models/source", f"s3://models/{to[0]}/out", "--to", *to))
            done.add(to)
        kills += one_round(number, to, hosts, generator, bucket)
    return {"rounds": rounds, "hosts": hosts, "killed": kills, "seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--source", type=Path, default=SOURCE, help="A checkpoint to convert; not below /tmp.")
    asked = parser.parse_args()
    with networks(asked.hosts):
        serve = ["ip", "netns", "exec", space(0), sys.executable, "-c", SERVER, f"{NETWORK}.1", str(PORT)]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                print(json.dumps(soak(asked.rounds, asked.seed, asked.hosts, asked.source)))
            finally:
                server.kill()


if __name__ == "__main__":
    main()
