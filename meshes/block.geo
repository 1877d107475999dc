// An L-shaped block of height 1/2, filled with tetrahedra.
h = 0.6;
Point(1) = {0.0, 0.0, 0, h};
Point(2) = {1.5, 0.0, 0, h};
Point(3) = {1.4, 0.6, 0, h};
Point(4) = {0.7, 0.5, 0, h};
Point(5) = {0.6, 1.2, 0, h};
Point(6) = {-0.1, 1.1, 0, h};
Line(1) = {1, 2};
Line(2) = {2, 3};
Line(3) = {3, 4};
Line(4) = {4, 5};
Line(5) = {5, 6};
Line(6) = {6, 1};
Curve Loop(1) = {1, 2, 3, 4, 5, 6};
Plane Surface(1) = {1};
solid[] = Extrude {0, 0, 0.5} { Surface{1}; };
Physical Volume("Y", 1) = {solid[1]};
