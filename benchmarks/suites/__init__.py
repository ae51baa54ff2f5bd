"""The suites: each has `options(parser)`, `measure(arguments)` and the arguments of its quick run, `QUICK`."""
