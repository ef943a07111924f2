"""MoME's ablations at a small scale: ``mixpert reproduce mome``.

``scenes`` and ``pages`` draw images, ``tasks`` asks about them, ``data`` keeps both, ``sentences`` embeds instructions.
``settings`` fixes the sizes; ``encoders`` and ``language`` train what is frozen then, ``features`` keeps what the
encoders see. ``model`` makes the arms and ``training`` trains them. ``jobs`` says what there is to run, which ``run``
starts by the scheduler of the package above. ``results`` computes the numbers, ``verdicts``, ``plots`` and ``report``
write them down.
"""
