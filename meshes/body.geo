// A block of 2 x 1 x 0.6 with a round bore of radius 0.3 through it, filled with tetrahedra; its left end is a part.
SetFactory("OpenCASCADE");
Box(1) = {0, 0, 0, 0.5, 1, 0.6};
Box(2) = {0.5, 0, 0, 1.5, 1, 0.6};
Cylinder(3) = {1.2, 0.5, -0.1, 0, 0, 0.8, 0.3};
BooleanDifference(4) = { Volume{2}; Delete; }{ Volume{3}; Delete; };
BooleanFragments{ Volume{1}; Delete; }{ Volume{4}; Delete; }
Mesh.MeshSizeMin = 0.22;
Mesh.MeshSizeMax = 0.22;
e = 1e-3;
Physical Volume("left end", 1) = {1};
Physical Volume("rest", 2) = {4};
Physical Surface("left face", 3) = Surface In BoundingBox {-e, -e, -e, e, 1 + e, 0.6 + e};
Physical Surface("bore", 4) = Surface In BoundingBox {0.9 - e, 0.2 - e, -e, 1.5 + e, 0.8 + e, 0.6 + e};
