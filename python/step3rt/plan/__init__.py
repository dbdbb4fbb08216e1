"""The planner: what a deployment costs, how fast it runs, and whether to disaggregate at all.

Reading order: `architecture` (what a model is) and `hardware` (what a card is), `cost` (the
Step-3 paper's section 4), `profile` and `stages` (how long each stage takes), `simulate` (the
pipeline), `search_space`, `batches`, `search` and `verdict` (which deployment, and why), `compare`
(predicted beside measured). Needs numpy only; `plots` alone imports matplotlib, and only when asked
to draw.
"""
