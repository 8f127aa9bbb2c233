"""The test suite of hisa: the number of a test family (T1 to T27) is in its file's name."""
