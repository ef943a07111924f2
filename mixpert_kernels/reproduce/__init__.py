"""The papers' comparisons at a scale anyone can rerun: ``mixpert reproduce``.

``styles``, ``charts``, ``documents``, ``photos`` and ``ambiguous`` draw the images, ``data`` keeps them. ``settings``
fixes the sizes, ``model`` and ``training`` make and train models, ``routes`` the router. ``jobs`` says what there is to
run, ``run`` starts each job as a ``worker`` process. ``cost`` measures, ``results``, ``statistics`` and ``rules``
compute the numbers, ``verdicts``, ``plots`` and ``report`` write them down. ``mome`` does the same for the other paper.
"""
