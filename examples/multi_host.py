"""Trains on two hosts, one of which has far less text than the other.

Two processes on this machine stand for two hosts with four devices each. The
first has long sentences. The second has short ones, so that most of its batch
is padding, and runs out of them before the end: from then on all of its batch
is. In the padding every logit is NaN.

You will see the loss of each step next to that of one process with the whole
batch, how far the gradients are apart, and how far off the mean of the means of
the devices would have been. Should one of the hosts die, the other is stopped;
`--die-at 3` shows that.

    python examples/multi_host.py
"""

import argparse
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from microbatches import distance
from padded_text import (
  END,
  LONGEST,
  PADDING,
  Params,
  encode,
  find_characters,
  find_sentences,
  init_params,
  masked_loss,
  pad,
)

import optax_masking as optax

HOSTS = 2
DEVICES = 4  # Of each host.
ROWS = 16  # Sentences in the batch of a host.
SHORT = 56  # Sentences of the second host, for three steps and a half.
SECONDS = 200  # After which the hosts are stopped.
RESULT = "seen.pickle"
ORPHANED = 3  # Exit status of a host whose parent ended.


def find_batches(steps: int) -> tuple[np.ndarray, int]:
  """Labels, of shape (HOSTS, steps, ROWS, ...), and how many characters.

  Each host would read its own. Here all of them read all, to keep it short.
  """
  sentences = sorted(find_sentences(), key=len)
  characters = find_characters(sentences)
  batches = np.full((HOSTS, steps * ROWS, LONGEST + 1), PADDING)
  for host, texts in enumerate((sentences[-steps * ROWS :], sentences[:SHORT])):
    labels = pad([encode(text + END, characters) for text in texts])
    batches[host, : len(labels)] = labels[: steps * ROWS]
  return batches.reshape(HOSTS, steps, ROWS, -1), len(characters)


def mean_of_means(params: Params, labels: jax.Array) -> jax.Array:
  """What goes wrong: a device with few characters counts as much as another."""
  return jax.lax.pmean(masked_loss(params, labels), "data")


def on_devices(function: Callable, mesh: Mesh) -> Callable:
  """Compiles a loss and its gradient, of labels of which each has its part."""
  return jax.jit(
    jax.shard_map(
      jax.value_and_grad(function),
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec("data")),
      out_specs=PartitionSpec(),
    )
  )


def end_with_parent() -> None:
  sys.stdin.read()  # Until the pipe is closed, in whatever way the parent ends.
  os._exit(ORPHANED)


def run_host(
  host: int, port: int, steps: int, die_at: int | None, folder: str
) -> None:
  """Trains, and writes down what it saw at each step."""
  threading.Thread(target=end_with_parent, daemon=True).start()
  jax.config.update("jax_num_cpu_devices", DEVICES)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.distributed.initialize(f"127.0.0.1:{port}", HOSTS, host)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  right = on_devices(partial(masked_loss, axis_name="data"), mesh)
  wrong = on_devices(mean_of_means, mesh)

  batches, characters = find_batches(steps)
  params = jax.device_get(init_params(jax.random.key(0), characters))
  optimizer = optax.sgd(0.5)
  state = optimizer.init(params)
  seen = []
  for step in range(steps):
    if host == HOSTS - 1 and step == die_at:
      os.kill(os.getpid(), signal.SIGKILL)
    own = batches[host, step]
    labels = jax.make_array_from_process_local_data(sharding, own)
    # Fetched at once: with few cores, devices that are at two programs at a
    # time may wait for each other for ever.
    got = jax.device_get(right(params, labels))
    seen.append((params, got, jax.device_get(wrong(params, labels))))
    updates, state = optimizer.update(got[1], state)
    params = jax.device_get(optax.apply_updates(params, updates))
  if host == 0:
    pathlib.Path(folder, RESULT).write_bytes(pickle.dumps(seen))
  jax.distributed.shutdown()


def how_it_ended(status: int) -> str:
  if status < 0:
    return f"was killed by {signal.Signals(-status).name}"
  return f"ended with exit status {status}"


def run_hosts(arguments: Sequence[str], folder: str) -> list:
  """Starts a process for each host and waits for them; all end together."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  logs = [pathlib.Path(folder, f"host{host}.log") for host in range(HOSTS)]

  def log_of(host: int) -> str:
    return f"\nThe log of host {host}:\n{logs[host].read_text()[-2000:]}"

  hosts: list[subprocess.Popen] = []
  try:
    for host, log in enumerate(logs):
      command = [sys.executable, __file__, *arguments, "--folder", folder]
      command += ["--host", str(host), "--port", str(port)]
      with log.open("w") as file:
        hosts.append(
          subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file
          )
        )
    end = time.monotonic() + SECONDS
    while None in (statuses := [process.poll() for process in hosts]):
      if any(statuses):
        break
      if time.monotonic() > end:
        sys.exit(
          f"{log_of(0)}\nerror: not done after {SECONDS} seconds, and all hosts"
          " were stopped."
        )
      time.sleep(0.1)
    failed = [(s, host) for host, s in enumerate(statuses) if s]
    if failed:
      status, host = min(failed)  # A signal is negative, and tells more.
      sys.exit(
        f"{log_of(host)}\nerror: host {host} {how_it_ended(status)}, and all"
        " were stopped."
      )
  finally:
    for process in hosts:
      process.kill()
      process.communicate()
  return pickle.loads(pathlib.Path(folder, RESULT).read_bytes())


def compare(steps: int, seen: list) -> bool:
  """Whether losses and gradients are those of one process."""
  batches, _ = find_batches(steps)
  whole = jax.jit(jax.value_and_grad(masked_loss))
  print(
    "\n        characters of   loss on          gradients  mean of means off by"
    "\n  step  host 0  host 1  2 hosts  1 host  differ by  loss       gradient"
  )
  equal = True
  for step, (params, right, wrong) in enumerate(seen):
    batch = batches[:, step]
    value, grads = whole(params, batch.reshape(-1, LONGEST + 1))
    error = distance(right[1], grads)
    equal &= error < 1e-6 and bool(abs(right[0] / value - 1) < 1e-6)
    counts = (batch != PADDING).sum((1, 2))
    print(
      f"  {step:4}  {counts[0]:6}  {counts[1]:6}  {right[0]:7.4f}  {value:.4f}"
      f"  {error:9.0e}  {wrong[0] / value - 1:+4.0%}"
      f"  {distance(wrong[1], grads):13.0%}",
      flush=True,
    )
  return equal


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--steps", type=int, default=8, help="1 to 64, 8 by default"
  )
  parser.add_argument(
    "--die-at", type=int, metavar="STEP", help="kill host 1 before this step"
  )
  for internal, kind in (("--host", int), ("--port", int), ("--folder", str)):
    parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if not 1 <= args.steps <= 64:
    parser.error("--steps must be from 1 to 64.")
  if args.die_at is not None and not 0 <= args.die_at < args.steps:
    parser.error(f"--die-at must be from 0 to {args.steps - 1}.")
  if args.host is not None:
    run_host(args.host, args.port, args.steps, args.die_at, args.folder)
    return
  print(
    f"{HOSTS} hosts with {DEVICES} devices each, {ROWS} sentences a host and"
    " step"
  )
  with tempfile.TemporaryDirectory() as folder:
    try:
      seen = run_hosts(sys.argv[1:] if argv is None else argv, folder)
    except KeyboardInterrupt:
      sys.exit("error: interrupted. All hosts were stopped.")
  if not compare(args.steps, seen):
    sys.exit("error: the hosts do not agree with one process.")


if __name__ == "__main__":
  main()
