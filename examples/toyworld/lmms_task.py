"""The toy world as a task of lmms-eval: a folder with a yaml, its questions and video files, made on the spot.

    python -m earlytom_compile.toyworld.lmms_task --output build/toyworld --videos 40
    python -m lmms_eval --include_path build/toyworld --tasks toyworld --model earlytom --model_args pretrained=...

The questions are those of ``earlytom eval --toy`` for the same split and videos, the files decode to the pixels it
draws, and an answer is right if it is the word: both ways count the same answers. Nothing is fetched.
"""

import argparse
import json
import sys
from pathlib import Path

from earlytom_compile.toyworld.questions import ask
from earlytom_compile.toyworld.world import SPLITS, rng_of, sample_video, write_mp4

TASK = "toyworld"
METRIC = "accuracy"
_WORDS = 4  # an answer is one word and the end

_YAML = """\
# Questions about drawn videos, with answers that follow from how they were drawn.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function toyworld_task.doc_to_visual
doc_to_text: !function toyworld_task.doc_to_text
doc_to_target: "{{{{answer}}}}"
process_results: !function toyworld_task.process_results
generation_kwargs:
  max_new_tokens: {words}
  temperature: 0
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_CODE = '''\
"""What toyworld.yaml calls."""


def doc_to_visual(doc):
    return [doc["video"]]


def doc_to_text(doc):
    return doc["question"]


def process_results(doc, results):
    return {"accuracy": float(results[0].strip() == doc["answer"])}
'''


def write_task(folder: str | Path, *, split: str = "test", first: int = 0, videos: int = 20) -> Path:
    """Videos ``first`` to ``first + videos - 1`` of ``split`` and one question of each category about each, as
    ``earlytom eval --toy`` asks them; returns the folder, for ``--include_path``."""
    folder = Path(folder).resolve()
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    asked = []
    for seed in range(first, first + videos):
        video, path = sample_video(split, seed), folder / "videos" / f"{split}-{seed}.mp4"
        write_mp4(video, path, lossless=True)
        asked += [
            {"video": str(path), "question": each.text, "answer": each.answer, "category": category}
            for category, each in ask(video, rng_of(split, seed, stream=3)).items()
        ]
    questions = folder / "questions.json"
    questions.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    yaml = _YAML.format(task=TASK, questions=json.dumps(str(questions)), words=_WORDS, metric=METRIC)
    (folder / "toyworld.yaml").write_text(yaml, encoding="utf-8")
    (folder / "toyworld_task.py").write_text(_CODE, encoding="utf-8")
    return folder


def main() -> None:
    """``python -m earlytom_compile.toyworld.lmms_task``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the task")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--first", type=int, default=0, help="number of the first video (0)")
    parser.add_argument("--videos", type=int, default=20, help="how many (20)")
    arguments = parser.parse_args()
    folder = write_task(arguments.output, split=arguments.split, first=arguments.first, videos=arguments.videos)
    sys.stdout.write(f"task {TASK} in {folder}\n")


if __name__ == "__main__":
    main()
