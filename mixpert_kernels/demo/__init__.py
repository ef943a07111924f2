"""The demo: route photographs, charts and documents to their experts and draw what happened.

``images`` gathers them (from ``photos``, ``charts`` and ``documents``), ``model`` builds the tower
and trains its router, ``timing`` measures, ``figure`` draws, ``run`` calls them in order.
"""
