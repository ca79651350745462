"""Kills runs at random moments, takes them up again and compares the results with those of runs that were let be.

python tests/kill_driver.py FOLDER --work train --kills 30 [--processes 2] [--alone] [--seed 0] [--seconds 600]

A moment is an event of the run (an update, a write to disk, ...), or some milliseconds after it. Which events there are
is noted in a first run that nothing kills; the moments are drawn from them with a seed, and printed. torch is imported
once: every run is a forked child of this process, which itself never computes.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import pyarrow.parquet as pq
import torch
from search.albums import contents
from tiny import STAGES, WORDS, free_port, make_groups, tiny_text_config, tiny_vision_config
from transformers import BertModel, BertTokenizer, CLIPImageProcessorPil, CLIPVisionModel, TrainerCallback

import icone_hf.embedding.shards as shards
import icone_hf.training.feature_cache as feature_cache
import icone_hf.training.stage_trainer as stage_trainer
from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, encode, load_pictures
from icone_hf.processes import join_processes
from icone_hf.search import index as index_source
from icone_hf.search.index_folder import IndexFolder
from icone_hf.search.row_table import RowTable
from icone_hf.training.whole_files import last_whole_checkpoint, step_of

NUM_GROUPS = 16
GRACE = 30.0  # seconds between SIGTERM and SIGKILL, as torchrun has it


def append(path, line):
    with path.open("a") as file:
        file.write(f"{line}\n")


class Events:
    """Counts a run's events, and kills it at one of them.

    Args:
        folder: whose writes are events.
        log: a file for the events' kinds.
        moment: `kind`, `number` of that kind, `delay` in seconds, `signal`, and whether to kill the process `alone`.
    """

    def __init__(self, folder, log, moment=None):
        self.folder, self.log, self.moment = str(folder), Path(log), moment
        self.counts = Counter()

    def __call__(self, kind):
        self.counts[kind] += 1
        append(self.log, kind)
        moment = self.moment
        if moment and moment["kind"] == kind and moment["number"] == self.counts[kind]:
            if moment["delay"]:
                threading.Timer(moment["delay"], self._kill).start()
            else:
                self._kill()

    def _kill(self):
        number = signal.Signals[self.moment["signal"]]
        if self.moment["alone"]:
            os.kill(os.getpid(), number)
        else:
            os.killpg(0, number)

    def audit(self, name, args):
        """Python tells of files before it touches them."""
        if name == "open":
            path, mode, flags = args
            if not (set(mode or "") & set("wax+") or (mode is None and flags & (os.O_WRONLY | os.O_RDWR))):
                return
        elif name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path = args[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder + os.sep):
            self("write")

    def after(self, module, name, kind):
        """Makes each call of a function an event, when it has been done; of a generator each item."""
        original = getattr(module, name)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            if hasattr(result, "__next__"):
                return self._items(result, kind)
            self(kind)
            return result

        setattr(module, name, watched)

    def _items(self, items, kind):
        for item in items:
            self(kind)
            yield item


class Updates(TrainerCallback):
    """Makes each part of an update an event, and notes which updates were done."""

    def __init__(self, events, file):
        self.events, self.file = events, Path(file)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.events("gradient")

    def on_step_end(self, args, state, control, **kwargs):
        append(self.file, f"{args.output_dir} {state.global_step}")
        self.events("update")


def make_towers(folder):
    torch.manual_seed(0)
    CLIPVisionModel(tiny_vision_config()).save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder / "vision")
    BertModel(tiny_text_config()).save_pretrained(folder / "text")  # with dropout: the random numbers count
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "text")


def load(root, **config):
    towers = str(root / "towers" / "vision"), str(root / "towers" / "text")
    torch.manual_seed(0)
    return IConEModel.from_encoders(*towers, projection_dim=16, **config), IConEProcessor.from_encoders(*towers)


def train(root, folder, events, arguments):
    model, processor = load(root, num_groups=NUM_GROUPS, text_pooling="mean")
    events.after(feature_cache, "pool_images", "cache")
    events.after(feature_cache, "pool_texts", "cache")
    events.after(stage_trainer, "measure_embeddings", "validation")
    events.after(stage_trainer, "embed_cached", "validation")
    events.after(stage_trainer, "encode_groups", "validation")
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        events.after(stage_trainer.StageTrainer, name, "save")
    values = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "logging_steps": 1}
    values |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_total_limit": 2}
    trainer = IConETrainer(
        model,
        IConETrainingArguments(str(folder), **{**values, **arguments}),
        make_groups(NUM_GROUPS),
        make_groups(10, start=NUM_GROUPS),
        processor,
        STAGES,
        [Updates(events, f"{folder}.updates")],
    )
    trainer.train(resume_from_checkpoint="auto")


def train_result(folder):
    """The result's bytes, and all that was logged on the way but times."""
    logs = []
    for stage in sorted(folder.glob("stages/*/stage.json")):
        for entry in json.loads(stage.read_text())["log_history"]:
            names = [name for name in entry if name in ("step", "loss", "learning_rate", "grad_norm")]
            names += [name for name in entry if name.endswith("_loss") or name.startswith("eval_")]
            logs.append({name: entry[name] for name in names if name != "train_loss"})
    logs = [entry for entry in logs if len(entry) > 1]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"metrics": json.loads((folder / "metrics.json").read_text()), "logs": logs, "weights": weights}


def check_stopped_training(folder, moment):
    """What SIGTERM has ended has saved every update."""
    updates = Path(f"{folder}.updates")
    if moment["signal"] != "SIGTERM" or not updates.is_file():
        return
    stage, step = updates.read_text().split("\n")[-2].rsplit(" ", 1)
    saved = last_whole_checkpoint(Path(stage))
    assert (Path(stage) / "stage.json").is_file() or (saved and step_of(saved) == int(step)), (
        f"{stage} has done update {step}, and saved {saved}"
    )


def encode_groups(root, folder, events, arguments):
    model, processor = load(root)
    events.after(shards, "pool_images", "batch")
    events.after(shards, "pool_texts", "batch")
    encode(model, processor, make_groups(30), folder, shard_size=7, batch_size=3, **arguments)


def encode_result(folder):
    tables = {}
    for path in sorted(folder.glob("*/[!.]*.parquet")):
        tables.setdefault(path.parent.name, []).extend(pq.ParquetFile(path).read(use_threads=False).to_pylist())
    return {kind: sorted(map(json.dumps, rows)) for kind, rows in tables.items()}


def check_stopped_encoding(folder, moment):
    for path in folder.glob("*/[!.]*.parquet"):
        assert pq.ParquetFile(path).read(use_threads=False).num_rows, path


def export(root, folder, events, arguments):
    """Exports for real once; then the graphs are those, written in two parts, for the exporter takes its time."""
    from icone_hf.publishing.onnx_export import export_onnx

    graphs = root / "graphs"

    def write(module, kwargs, f, **options):
        graph = (graphs / Path(f).name).read_bytes()
        with open(f, "wb", buffering=0) as file:
            for part in (graph[: len(graph) // 2], graph[len(graph) // 2 :]):
                file.write(part)
                events("graph")

    if graphs.is_dir():
        torch.onnx.export = write
    export_onnx(*load(root, text_pooling="mean"), folder)
    if not graphs.is_dir():
        graphs.mkdir()
        for path in (folder / "onnx").iterdir():
            (graphs / path.name).write_bytes(path.read_bytes())


def export_result(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_stopped_export(folder, moment):
    """What a loader looks for, a graph by its name, is whole if it is there."""
    whole = export_result(folder.parent / "reference")
    for path in folder.glob("onnx/*.onnx"):
        assert export_result(folder)[str(path.relative_to(folder))] == whole[str(path.relative_to(folder))], path


def index_images(root, folder, events, arguments):
    """Indexes a folder of images, and captioned ones that lie in no file; then drops some of the folder's."""
    join_processes()
    model, processor = load(root)
    photos = root / "photos"
    if not photos.is_dir():  # before any run is killed
        photos.mkdir()
        for number, content in enumerate(contents(12)):
            (photos / f"{number:02}.png").write_bytes(content)
    files = load_pictures(photos)
    embedded = make_groups(8, start=10)  # the first two are the folder's too
    events.after(shards, "pool_images", "batch")
    events.after(shards, "pool_texts", "batch")
    events.after(shards.StoredRows, "write", "shard")
    events.after(RowTable, "put", "store")
    events.after(RowTable, "remove", "store")
    options = {"shard_size": 3, "batch_size": 1, **arguments}  # one by one, so that embeddings are equal to the bit
    index_source(model, processor, files, folder, source_name="photos", **options)
    index_source(model, processor, embedded, folder, source_name="embedded", **options)
    index_source(model, processor, files.select(range(3, 12)), folder, source_name="photos", prune=True, **options)


def index_result(folder):
    """All that an index answers with, and what it holds on the disk."""
    result = {"report": json.loads((folder / "report.json").read_text())}
    result["copies"] = sorted(path.name for path in folder.glob("images/**/*.jpg"))
    result["hidden"] = sorted(str(path.relative_to(folder)) for path in folder.glob("**/.*") if path.is_file())
    result["files"] = len(list(folder.glob("exact/*/*")))
    result |= {f"shards of {kind}": rows for kind, rows in encode_result(folder).items()}
    for kind in ("pictures", "sentences"):
        store = IndexFolder(folder).store(kind)
        rows = store.get(store.listing()["id"].to_pylist()).to_pylist()
        result[kind] = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return result


def check_stopped_index(folder, moment):
    """What is there can be searched, whole."""
    check_stopped_encoding(folder, moment)
    for kind in ("pictures", "sentences"):
        store = IndexFolder(folder).store(kind)
        if count := store.count():
            found = store.search(np.eye(16)[0], count)
            assert len(found) == len(set(found["id"].to_pylist())) == count


WORKS = {
    "index": (index_images, index_result, check_stopped_index),
    "train": (train, train_result, check_stopped_training),
    "encode": (encode_groups, encode_result, check_stopped_encoding),
    "export": (export, export_result, check_stopped_export),
}


class Driver:
    """Runs a work in forked processes, kills it and takes it up again.

    Args:
        root: a folder for everything.
        work: a name in `WORKS`.
        processes: of each run.
        arguments: of the work.
        signals: to kill it by, in turn.
    """

    def __init__(self, root, work, processes=1, arguments=None, signals=("SIGKILL", "SIGTERM")):
        self.root, self.processes, self.arguments, self.signals = root, processes, arguments or {}, signals
        self.work, self.result, self.check = WORKS[work]

    def run(self, folder, moment=None):
        """Runs all processes to their end, and ends the others when one has failed, as torchrun does.

        Returns:
            Their exit codes, and the seconds from the first failure to the last end.
        """
        port = free_port()
        pids, codes, failed_at, begun = [], {}, None, time.monotonic()
        for rank in range(self.processes):
            pids.append(self._start(folder, rank, moment, pids[0] if pids else 0, port))
        while len(codes) < len(pids):
            time.sleep(0.005)
            for pid in set(pids) - set(codes):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid] and failed_at is None:
                        failed_at = time.monotonic()
                        signal_all(set(pids) - set(codes), signal.SIGTERM)
            if time.monotonic() - (failed_at or begun) > (GRACE if failed_at else 300):
                signal_all(set(pids) - set(codes), signal.SIGKILL)
        return [codes[pid] for pid in pids], time.monotonic() - failed_at if failed_at else 0.0

    def _start(self, folder, rank, moment, group, port):
        """Forks one process; its exit code is that of Python, had it been a program of its own."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            # Here too: the second process may be the first to run, and its group must be there.
            with contextlib.suppress(ProcessLookupError):
                os.setpgid(pid, group or pid)
            return pid
        code = 1
        try:
            os.setpgid(0, group)
            for stream in (1, 2):
                os.dup2(os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            if self.processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            watched = moment if moment and rank == moment["rank"] else None
            events = Events(folder, f"{folder}.events-{rank}", watched)
            sys.addaudithook(events.audit)
            self.work(self.root, folder, events, self.arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)

    def prepare(self):
        """Makes the towers, and the run that nothing kills."""
        if not (self.root / "towers").is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            work, self.work = self.work, lambda root, *_: make_towers(root / "towers")
            processes, self.processes = self.processes, 1
            assert self.run(self.root / "making") == ([0], 0)
            self.work, self.processes = work, processes
        reference = self.root / "reference"
        codes, _ = self.run(reference)
        assert not any(codes), Path(f"{reference}.log").read_text()[-3000:]
        events = [Path(f"{reference}.events-{rank}").read_text().split() for rank in range(self.processes)]
        return self.result(reference), [Counter(of_rank) for of_rank in events]

    def draw(self, counts, rng, index, alone):
        """Draws a moment: each kind of event in turn, all signals, at once or up to 30 ms later."""
        rank = rng.randrange(self.processes)
        kinds = sorted(counts[rank])
        kind = kinds[index % len(kinds)]
        return {
            "rank": rank,
            "kind": kind,
            "number": rng.randint(1, counts[rank][kind]),
            "delay": rng.choice([0.0, round(rng.uniform(0.0005, 0.03), 4)]),
            "signal": self.signals[(index + index // len(kinds)) % len(self.signals)],
            "alone": alone,
        }

    def kill(self, folder, moment, expected):
        """Kills a run at a moment and takes it up again; returns what went wrong, and how the run had ended."""
        codes, seconds = self.run(folder, moment)
        ended = f"{codes} after {seconds:.1f} s"
        try:
            if moment["signal"] == "SIGTERM" and self.work is train:
                # A second SIGTERM, from the launcher, may meet a process that has saved its work and is about to end.
                found = {codes[moment["rank"]]} if moment["alone"] else set(codes)
                in_order = found == {0} or (143 in found and found <= {0, 143, -signal.SIGTERM})
                assert in_order, "SIGTERM has not ended it in order"
            if any(codes):
                self.check(folder, moment)
            again, _ = self.run(folder)
            assert not any(again), "it could not be taken up again"
            found = self.result(folder)
            different = [name for name in expected if found.get(name) != expected[name]]
            assert not different, f"it differs in {', '.join(different)}"
        except AssertionError as error:
            return str(error), ended
        return None, ended


def signal_all(pids, number):
    for pid in pids:
        os.kill(pid, number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", choices=WORKS, default="train")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="Kill one of the processes; the others must end by it.")
    parser.add_argument("--arguments", type=json.loads, default={}, help="Of the run, as JSON.")
    parser.add_argument("--signals", nargs="+", default=["SIGKILL", "SIGTERM"], help="To kill it by, in turn.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Draw no further moment after these.")
    args = parser.parse_args()
    if args.folder.is_dir() and any(args.folder.iterdir()):
        parser.error(f"{args.folder} isn't empty.")
    driver = Driver(args.folder.resolve(), args.work, args.processes, args.arguments, args.signals)
    gc.collect()
    gc.freeze()  # no fork looks for garbage in what was imported here
    begun = time.monotonic()
    expected, counts = driver.prepare()
    print(f"{args.work}, {args.processes} processes, seed {args.seed}; events of a run: {dict(counts[0])}", flush=True)
    tried, before, lost = 0, 0, []
    for index in range(args.kills):
        if time.monotonic() - begun > args.seconds:
            break
        moment = driver.draw(counts, random.Random(f"{args.seed} {index}"), index, args.alone)
        fault, ended = driver.kill(driver.root / f"kill-{index}", moment, expected)
        tried += 1
        before += ended.startswith("[0")
        lost += [index] if fault else []
        print(f"{index:3} {json.dumps(moment)} {ended}: {fault or 'nothing lost'}", flush=True)
    summary = {"kills": tried, "lost": len(lost), "ended_before": before, "seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps(summary))
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
