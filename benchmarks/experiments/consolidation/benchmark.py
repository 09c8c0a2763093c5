"""The paper's three findings on real photographs, through repcon's own commands.

    python -m benchmarks.experiments.consolidation --data FOLDER            at most an hour on two cores
    python -m benchmarks.experiments.consolidation --data FOLDER --short    two minutes: that it runs, no result
    python -m benchmarks.experiments.consolidation --data FOLDER --long     224 pixels, more seeds, for a GPU
    ... --domain-images [N]   unlabelled images of the domains' teacher halves join the proxy; of each, all or N

For each seed and domain the classes are split at random: task teachers learn the first half, everything is measured
on the second, which no task teacher or student was trained on. Students of the generalist's own architecture are
distilled on unlabelled images of other things. FOLDER holds the five tars of tools/photos.py (or set REPCON_DATA).

finding_1   generalist - student of the task teacher alone: what distilling one task costs
finding_2   student of task teacher and generalist - better of the two
finding_3   the same for ONE student of all domains' teachers and the generalist; mean and worst domain
side_by_side, side_by_side_of_tasks   those two students - task teacher and generalist side by side, two backbones
over_joint  ONE student of all domains - one network trained with all domains' labels (the paper's oracle)

In points of linear-probe accuracy; `finding_2_shot_5` and so on are the same by 1-, 5- and 10-shot and by kNN.
A work folder that was stopped goes on where it was.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.experiments.consolidation import summary
from benchmarks.experiments.consolidation.protocol import EPOCHS_WITH_ALL, LONG, METHODS, SHORT, USUAL, Protocol
from benchmarks.experiments.consolidation.study import Study
from benchmarks.harness import script
from repcon.runtime.system import cores


def main() -> None:
    parser = script.parser("The paper's three findings on real photographs.", data="folder with the five tars")
    parser.add_argument("--work", default="bench-run/consolidation", help="folder for packs, labels, models; resumed")
    parser.add_argument("--seeds", help="for example 0,1,2")
    parser.add_argument("--domains", help="for example birds,grocery")
    parser.add_argument("--methods", help=f"rows of the table, some of {', '.join(METHODS)}")
    parser.add_argument(
        "--domain-images", type=int, nargs="?", const=0, metavar="N",
        help="unlabelled images of the teacher halves join in: all, or N of each domain",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, help="of the students")
    parser.add_argument("--jobs", type=int, help="commands side by side; one per core by default, one on a GPU")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="two minutes, to see that it runs")
    form.add_argument("--long", action="store_true", help="224 pixels and more seeds, on a GPU")
    arguments = parser.parse_args()
    data = script.photographs(arguments)
    protocol = _protocol(arguments)
    started = time.time()
    jobs = arguments.jobs or (1 if torch.cuda.is_available() else cores())
    study = Study(data, Path(arguments.work) / protocol.name, protocol, jobs)
    cells = study.run()
    results = summary.summarise(cells, protocol, study.facts() | {"wall_seconds": round(time.time() - started)})
    summary.show(results)
    summary.write(results, study.work, arguments)


def _protocol(arguments: argparse.Namespace) -> Protocol:
    protocol = SHORT if arguments.short else LONG if arguments.long else USUAL
    if arguments.domain_images == 0:
        protocol = replace(protocol, epochs=EPOCHS_WITH_ALL)
    return protocol.changed(
        domain_images=arguments.domain_images,
        epochs=arguments.epochs,
        seeds=tuple(int(seed) for seed in arguments.seeds.split(",")) if arguments.seeds else None,
        domains=tuple(arguments.domains.split(",")) if arguments.domains else None,
        methods=tuple(arguments.methods.split(",")) if arguments.methods else None,
    )
