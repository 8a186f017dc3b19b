#!/usr/bin/env python3
"""run_sets.py - settings of the KV cache over sets of questions: one `vitrail eval` for each setting and set, several at a
time on one device, a line of a table for each, all of it as JSON.

  run_sets.py VITRAIL SETTINGS.json OUT.json SET=QUESTIONS.jsonl ...

SETTINGS.json: a list of {"label", "policy", "budget": "0.2,0.1", "options": [more options of eval], "sets": [only these]}.
PARALLEL=4 evals run at once; DEVICE=cuda; CONFIG=configs/demo.yaml; OPTIONS are more options of every eval. "policy" may
be several with commas between. A row of OUT.json has what eval reports of a run, and the shares of the full cache's bytes
that were kept and that a decode step read; "followup" is the exact match of second questions. Where questions have
continuations instead of answers the table shows their perplexity.
"""
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

COLUMNS = ("exact_match", "anls", "token_f1", "log_likelihood", "perplexity", "n")


def run(vitrail, setting, name, questions):
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "r.json")
        command = [vitrail, "eval", "--config", os.environ.get("CONFIG", "configs/demo.yaml"),
                   "--device", os.environ.get("DEVICE", "cuda"),
                   "--max-num-seqs", "32", "--gpu-memory-utilization", "0.1", "--log-level", "error", "--no-forced",
                   "--questions", questions, "--kv-policy", "full," + setting["policy"],
                   "--kv-budget", setting["budget"], "--output", output]
        command += setting.get("options", []) + os.environ.get("OPTIONS", "").split()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{setting['label']}, {name}: {done.stderr.strip()[-300:]}")
        with open(output) as f:
            runs = json.load(f)["runs"]
    full = next(r for r in runs if r["policy"] == "full")
    rows = []
    for r in runs:
        row = {"label": setting["label"], "set": name, "policy": r["policy"], "budget": r["budget"], "dtype": r["dtype"],
               "kept": r["bytes_kept"] / r["bytes_full"],
               "read": r["bytes_read_per_step"] / full["bytes_read_per_step"]}
        row.update({c: r[c] for c in COLUMNS if r.get(c) is not None})
        if r.get("followup"):
            row["followup"] = r["followup"]["exact_match"]
        rows.append(row)
    return rows


def show(rows):
    table = {}
    for r in rows:
        if r["policy"] == "full":
            r = dict(r, label="")
        table.setdefault((r["label"], r["policy"], str(r["budget"]), r["dtype"]), {})[r["set"]] = r
    for (label, policy, budget, dtype), sets in table.items():
        cells = []
        for name, r in sets.items():
            second = f"/{100 * r['followup']:.1f}" if "followup" in r else ""
            score = f"{100 * r['exact_match']:.1f}{second}" if "exact_match" in r else f"ppl {r['perplexity']:.2f}"
            cells.append(f"{name} {score} ({100 * r['kept']:.1f}, {100 * r['read']:.1f})")
        print(f"{label:24} {policy:18} {budget:>6} {dtype:>5}  " + "  ".join(cells))


def main():
    if len(sys.argv) < 5:
        raise SystemExit(__doc__)
    vitrail, settings, output = sys.argv[1:4]
    sets = dict(s.split("=", 1) for s in sys.argv[4:])
    with open(settings) as f:
        settings = json.load(f)
    todo = [(s, n) for s in settings for n in s.get("sets", sets) if n in sets]
    rows = []
    with ThreadPoolExecutor(int(os.environ.get("PARALLEL", "4"))) as pool:
        for done in pool.map(lambda t: run(vitrail, t[0], t[1], sets[t[1]]), todo):
            rows += done
    with open(output, "w") as f:
        json.dump(rows, f, indent=1)
        f.write("\n")
    print("exact match in %, second questions behind the slash (bytes kept, bytes read a step, % of the full cache)")
    show(rows)


main()
