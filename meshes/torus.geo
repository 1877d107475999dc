// A torus in space, of the radii 1 and 0.4: a circle that goes around the z axis in four quarters.
h = 0.22;
Point(1) = {1, 0, 0, h};
Point(2) = {1.4, 0, 0, h};
Point(3) = {1, 0, 0.4, h};
Point(4) = {0.6, 0, 0, h};
Point(5) = {1, 0, -0.4, h};
Circle(1) = {2, 1, 3};
Circle(2) = {3, 1, 4};
Circle(3) = {4, 1, 5};
Circle(4) = {5, 1, 2};
circle[] = {1 : 4};
For k In {1 : 4}
  next[] = {};
  For c In {0 : 3}
    made[] = Extrude {{0, 0, 1}, {0, 0, 0}, Pi / 2} { Curve{circle[c]}; };
    next[] += made[0];
    surfaces[] += made[1];
  EndFor
  circle[] = next[];
EndFor
Coherence;
Physical Surface("front", 1) = {surfaces[{8 : 15}]};
Physical Surface("back", 2) = {surfaces[{0 : 7}]};
