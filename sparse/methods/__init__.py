"""The methods of sparse training, one file each."""
