// The unit sphere, a closed surface in space: eight octants, which make a northern and a southern half.
h = 0.25;
Point(1) = {0, 0, 0, h};
Point(2) = {1, 0, 0, h};
Point(3) = {0, 1, 0, h};
Point(4) = {-1, 0, 0, h};
Point(5) = {0, -1, 0, h};
Point(6) = {0, 0, 1, h};
Point(7) = {0, 0, -1, h};
Circle(1) = {2, 1, 3};
Circle(2) = {3, 1, 4};
Circle(3) = {4, 1, 5};
Circle(4) = {5, 1, 2};
For k In {0 : 3}
  Circle(11 + k) = {2 + k, 1, 6};
  Circle(21 + k) = {2 + k, 1, 7};
EndFor
For k In {0 : 3}
  Curve Loop(1 + k) = {1 + k, 11 + (k + 1) % 4, -(11 + k)};
  Surface(1 + k) = {1 + k} In Sphere {1};
  Curve Loop(11 + k) = {-(1 + k), 21 + k, -(21 + (k + 1) % 4)};
  Surface(11 + k) = {11 + k} In Sphere {1};
EndFor
Physical Surface("north", 1) = {1 : 4};
Physical Surface("south", 2) = {11 : 14};
Physical Curve("equator", 3) = {1 : 4};
