"""A small world of moving shapes, questions about it, and a Video-LLM trained from scratch to answer them.

world.py      videos: scenes, cuts, pans, flashes, drawn as uint8 frames, or encoded as mp4
questions.py  multiple-choice questions with answers that are known by construction
language.py   the words of those questions and their tokenizer
model.py      a LlavaOnevisionForConditionalGeneration of their size, and its checkpoint folder
checkpoint.py a LLaVA-OneVision of any size as a checkpoint folder
batches.py    training batches, and rows of questions
answers.py    answers to many questions in one pass
train.py      the training script
methods.py    ways to fewer video tokens: parts of EarlyTom, and all of the next three
installed.py  those that run the code that users run: EarlyTom, and other papers' methods
baselines.py  fewer frames, and means of frames and of tokens
merging.py    frames that merge inside the encoder: stage 1 of EarlyTom, and runs
cost.py       operations of a whole prefill
worlds.py     what differs between this world and others that are asked about
evaluate.py   accuracy by method, ratio and category
timing.py     the time to the first token, all methods in turn
seeds.py      one row of several models
grids.py      which blocks of tokens are best averaged
kept.py       what the tokens show that a selection keeps

report.py     the table, JSON and Markdown of evaluate.py
plots.py      its pictures

pareto_rows.py    what is compared where accuracy stands against cost
pareto.py         what nothing beats, and how far plus is ahead at equal cost
pareto_report.py  the table of it, and JSON
pareto_plot.py    its picture

weights/      the trained checkpoint

Videos, questions, language and weights belong together: whoever changes one of the first three trains anew
(test_weights.py fails until then).

In the repository this folder is ``examples/toyworld``; installed it is ``earlytom_compile.toyworld``, so that
``earlytom demo`` and ``earlytom eval --toy`` find it.
"""
