"""Other ways to fewer video tokens, as their papers describe them: ``compile(model, method="visionzip")``.

One file a method; ``base.py`` says what a method is, ``registry.py`` which there are, docs/adding-a-method.md how to
write one.
"""
