"""A second world, so that one toy is not the judge: textured scenes through a real codec, before a pretrained encoder.

world.py      videos: scenes with cuts, long still stretches, things that move, appear or flash
drawing.py    one picture: textures, light, shading, noise
film.py       through an H.264 file and back
story.py      what is seen when and where: the source of every answer and label
questions.py  multiple-choice questions with answers that are known by construction
language.py   the words of those questions and their tokenizer
clips.py      short clips, and training videos put together from them
pool.py       features of the clips by the frozen encoder, kept on disk
model.py      a LlavaOnevisionForConditionalGeneration on DINOv2, and its checkpoint without the encoder's weights
batches.py    training batches out of a pool
answers.py    answers to many questions in one pass
train.py      the training script

README.md says what it is for, how to train it, and how far that has come.

In the repository this folder is ``examples/photoworld``; installed it is ``earlytom_compile.photoworld``. What both
worlds share comes from ``earlytom_compile.toyworld``: colours and shapes, the kind of a question, the frame of a run.
"""
