"""Tests of the pipe, one module per section of the plugin."""
