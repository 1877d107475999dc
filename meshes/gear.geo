// A gear of eight teeth, with a hole of 16 corners. Half a tooth is meshed, and copied by reflections and rotations: the mesh
// has all 16 symmetries of the gear, up to round-off.
teeth = 8;
h = 0.058;
half = Pi / teeth;
flank = 0.60 * half;  // the angles where a tooth begins, and where its tip ends
tip = 0.38 * half;
root = 0.76 * Cos(half - flank);
Point(1) = {0.30, 0, 0, h};
Point(2) = {1.00 * Cos(tip), 0, 0, h};
Point(3) = {1.00 * Cos(tip), 1.00 * Sin(tip), 0, h};
Point(4) = {0.76 * Cos(flank), 0.76 * Sin(flank), 0, h};
Point(5) = {root * Cos(half), root * Sin(half), 0, h};
Point(6) = {0.30 * Cos(half), 0.30 * Sin(half), 0, h};
Line(1) = {1, 2};
Line(2) = {2, 3};
Line(3) = {3, 4};
Line(4) = {4, 5};
Line(5) = {5, 6};
Line(6) = {6, 1};
Curve Loop(1) = {1, 2, 3, 4, 5, 6};
Plane Surface(1) = {1};
mirrored[] = Symmetry {0, 1, 0, 0} { Duplicata { Surface{1}; } };
parts[] = {1, mirrored[0]};
For k In {1 : teeth - 1}
  parts[] += Rotate {{0, 0, 1}, {0, 0, 0}, 2 * k * half} { Duplicata { Surface{1, mirrored[0]}; } };
EndFor
Coherence;
Periodic Surface {parts[1]} = {1} Affine {1, 0, 0, 0,  0, -1, 0, 0,  0, 0, 1, 0};
For k In {1 : teeth - 1}
  c = Cos(2 * k * half);
  s = Sin(2 * k * half);
  Periodic Surface {parts[2 * k]} = {1} Affine {c, -s, 0, 0,  s, c, 0, 0,  0, 0, 1, 0};
  Periodic Surface {parts[2 * k + 1]} = {1} Affine {c, s, 0, 0,  s, -c, 0, 0,  0, 0, 1, 0};
EndFor
Physical Surface("Y", 1) = {parts[]};
