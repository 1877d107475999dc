// The annulus 0.4 < |y| < 1, in quadrilaterals of a polar grid: cells are small inside, and left and right are told apart.
around = 12;  // cells a quarter
across = 7;
Point(1) = {0, 0, 0};
For k In {0 : 3}
  Point(10 + k) = {0.4 * Sin(k * Pi / 2), 0.4 * Cos(k * Pi / 2), 0};
  Point(20 + k) = {Sin(k * Pi / 2), Cos(k * Pi / 2), 0};
EndFor
For k In {0 : 3}
  Circle(10 + k) = {10 + k, 1, 10 + (k + 1) % 4};
  Circle(20 + k) = {20 + k, 1, 20 + (k + 1) % 4};
  Line(30 + k) = {10 + k, 20 + k};
EndFor
For k In {0 : 3}
  Curve Loop(1 + k) = {10 + k, 30 + (k + 1) % 4, -(20 + k), -(30 + k)};
  Plane Surface(1 + k) = {1 + k};
EndFor
Transfinite Curve {10 : 13, 20 : 23} = around + 1;
Transfinite Curve {30 : 33} = across + 1 Using Progression 1.12;
Transfinite Surface {1 : 4};
Recombine Surface {1 : 4};
Physical Surface("right", 1) = {1, 2};
Physical Surface("left", 2) = {3, 4};
Physical Curve("inner circle", 3) = {10 : 13};
Physical Curve("outer circle", 4) = {20 : 23};
