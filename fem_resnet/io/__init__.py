"""Networks in files: `save` (`writing`) and `load` (`reading`).

A file is one HDF5 file of Firedrake's CheckpointFile. It can be read on any number of ranks. It holds the mesh, the values of
the bases at the nodes (of cell indicators only their name), all coefficients, and the settings of the network. It does not
depend on the ranks that wrote it, and holds nothing that follows from its other fields. It ends with a checksum
(`fem_resnet.files`).

Whoever wrote a file, it runs no code and takes no more memory than it has bytes. All of it is checked before Firedrake and
PETSc read it: each field (`group`), the mesh and the functions on it (`meshes`), the settings (`settings`), and the arrays
that belong to these settings (`arrays`).
"""
