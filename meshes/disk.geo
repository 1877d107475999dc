// The unit disk: the inner half of its radius, and the ring around it.
h = 0.13;
Point(1) = {0, 0, 0, h};
For k In {0 : 3}
  Point(10 + k) = {0.5 * Cos(k * Pi / 2), 0.5 * Sin(k * Pi / 2), 0, h};
  Point(20 + k) = {Cos(k * Pi / 2), Sin(k * Pi / 2), 0, h};
EndFor
For k In {0 : 3}
  Circle(10 + k) = {10 + k, 1, 10 + (k + 1) % 4};
  Circle(20 + k) = {20 + k, 1, 20 + (k + 1) % 4};
EndFor
Curve Loop(1) = {10 : 13};
Curve Loop(2) = {20 : 23};
Plane Surface(1) = {1};
Plane Surface(2) = {2, 1};
Physical Surface("inside", 1) = {1};
Physical Surface("ring", 2) = {2};
Physical Curve("rim", 3) = {20 : 23};
