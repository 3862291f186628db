"""Trains on two hosts, one of which has far less text than the other.

Two processes on this machine stand for two hosts with four devices each. The
first has long sentences. The second has short ones, so that most of its batch
is padding. Before the end it has no sentence left, and all of its batch is
padding. In the padding every logit is NaN.

The output has the loss of each step next to that of one process with the whole
batch, the distance of the gradients, and the error that the mean of the means
of the devices would have. If one of the hosts dies, the example stops the
other; `--die-at 3` shows that.

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
SHORT_SENTENCES = 56  # Of the second host, for three steps and a half.
TIMEOUT_S = 200  # After this time the hosts are stopped.
HISTORY_FILE = "history.pickle"
PARENT_ENDED = 3  # Exit status of a host whose parent ended.


def find_batches(steps: int) -> tuple[np.ndarray, int]:
  """Labels, of shape (HOSTS, steps, ROWS, ...), and the number of characters.

  In practice each host reads its own labels. Here all hosts read all labels, so
  that the example is short.
  """
  sentences = sorted(find_sentences(), key=len)
  characters = find_characters(sentences)
  batches = np.full((HOSTS, steps * ROWS, LONGEST + 1), PADDING)
  for host, texts in enumerate(
    (sentences[-steps * ROWS :], sentences[:SHORT_SENTENCES])
  ):
    labels = pad([encode(text + END, characters) for text in texts])
    batches[host, : len(labels)] = labels[: steps * ROWS]
  return batches.reshape(HOSTS, steps, ROWS, -1), len(characters)


def mean_of_means(params: Params, labels: jax.Array) -> jax.Array:
  """Wrong: a device with few characters counts as much as another."""
  return jax.lax.pmean(masked_loss(params, labels), "data")


def on_devices(function: Callable, mesh: Mesh) -> Callable:
  """Compiles a loss and its gradient, with the labels split over devices."""
  return jax.jit(
    jax.shard_map(
      jax.value_and_grad(function),
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec("data")),
      out_specs=PartitionSpec(),
    )
  )


def exit_with_parent() -> None:
  sys.stdin.read()  # Returns when the parent ends, even if it is killed.
  os._exit(PARENT_ENDED)


def run_host(
  host: int, port: int, steps: int, die_at: int | None, folder: str
) -> None:
  """Trains, and saves the parameters, losses and gradients of each step."""
  threading.Thread(target=exit_with_parent, daemon=True).start()
  jax.config.update("jax_num_cpu_devices", DEVICES)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.distributed.initialize(f"127.0.0.1:{port}", HOSTS, host)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  masked = on_devices(partial(masked_loss, axis_name="data"), mesh)
  unweighted = on_devices(mean_of_means, mesh)

  batches, characters = find_batches(steps)
  params = jax.device_get(init_params(jax.random.key(0), characters))
  optimizer = optax.sgd(0.5)
  state = optimizer.init(params)
  history = []
  for step in range(steps):
    if host == HOSTS - 1 and step == die_at:
      os.kill(os.getpid(), signal.SIGKILL)
    own_batch = batches[host, step]
    labels = jax.make_array_from_process_local_data(sharding, own_batch)
    # Fetched at once: with few cores, devices that run two programs at a time
    # may wait for each other for ever.
    loss, grads = jax.device_get(masked(params, labels))
    wrong = jax.device_get(unweighted(params, labels))
    history.append((params, (loss, grads), wrong))
    updates, state = optimizer.update(grads, state)
    params = jax.device_get(optax.apply_updates(params, updates))
  if host == 0:
    pathlib.Path(folder, HISTORY_FILE).write_bytes(pickle.dumps(history))
  jax.distributed.shutdown()


def describe_exit(status: int) -> str:
  if status < 0:
    return f"was killed by {signal.Signals(-status).name}"
  return f"ended with exit status {status}"


def run_hosts(arguments: Sequence[str], folder: str) -> list:
  """Runs a process for each host. If one of them fails, all are stopped."""
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
    end = time.monotonic() + TIMEOUT_S
    while None in (statuses := [process.poll() for process in hosts]):
      if any(statuses):
        break
      if time.monotonic() > end:
        sys.exit(
          f"{log_of(0)}\nerror: not done after {TIMEOUT_S} seconds: all hosts"
          " were stopped."
        )
      time.sleep(0.1)
    failed = [(s, host) for host, s in enumerate(statuses) if s]
    if failed:
      # The status of a signal is negative, and the more likely cause.
      status, host = min(failed)
      sys.exit(
        f"{log_of(host)}\nerror: host {host} {describe_exit(status)}, and all"
        " were stopped."
      )
  finally:
    for process in hosts:
      process.kill()
      process.communicate()
  return pickle.loads(pathlib.Path(folder, HISTORY_FILE).read_bytes())


def compare(steps: int, history: list) -> bool:
  """Whether the hosts have the losses and gradients of one process."""
  batches, _ = find_batches(steps)
  whole = jax.jit(jax.value_and_grad(masked_loss))
  print(
    "\n        characters of   loss on          gradients  mean of means off by"
    "\n  step  host 0  host 1  2 hosts  1 host  differ by  loss       gradient"
  )
  equal = True
  for step, (params, (loss, grads), wrong) in enumerate(history):
    batch = batches[:, step]
    expected_loss, expected = whole(params, batch.reshape(-1, LONGEST + 1))
    error = distance(grads, expected)
    equal &= error < 1e-6 and bool(abs(loss / expected_loss - 1) < 1e-6)
    counts = (batch != PADDING).sum((1, 2))
    print(
      f"  {step:4}  {counts[0]:6}  {counts[1]:6}  {loss:7.4f}"
      f"  {expected_loss:.4f}  {error:9.0e}"
      f"  {wrong[0] / expected_loss - 1:+4.0%}"
      f"  {distance(wrong[1], expected):13.0%}",
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
      history = run_hosts(sys.argv[1:] if argv is None else argv, folder)
    except KeyboardInterrupt:
      sys.exit("error: interrupted. All hosts were stopped.")
  if not compare(args.steps, history):
    sys.exit("error: the hosts do not agree with one process.")


if __name__ == "__main__":
  main()
