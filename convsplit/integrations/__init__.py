"""At home in other libraries: one thin file each, imported on demand.

`import convsplit` imports none of them. A file here is imported by whoever asks for it, and by the conversion of a
model whose class comes from that library, which is installed then; see `SETTLED_BY` in `convsplit.rewrite`.
"""
