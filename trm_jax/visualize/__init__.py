"""Pictures and tables for people: region heat maps, benchmark charts, training curves.

regions  one PNG per image with the heat maps of its best classes
report   Markdown tables and charts of benchmarks/results/*.json
curves   the metrics.jsonl of one or several runs
prototypes, words_regions, reranked  a knowledge of words, what it sees, what it changes
style    the look that they share

Figures are drawn with matplotlib's object interface on the Agg canvas: no display, no global
state, safe in threads and on headless machines.
"""
