"""Callbacks for the training loops of other packages, each in a file that imports its package."""
