// A graph in space: the edges of a cube, spokes from its corners to its centre, where eight edges meet, and a tail.
h = 0.2;
For k In {0 : 7}
  Point(1 + k) = {k % 2, Floor(k / 2) % 2, Floor(k / 4), h};
EndFor
Point(9) = {0.5, 0.5, 0.5, h};
Point(10) = {1.9, 1.4, 1.2, h};
line = 0;
For k In {0 : 7}
  If (k % 2 == 0)
    line += 1;
    Line(line) = {1 + k, 2 + k};
  EndIf
  If (Floor(k / 2) % 2 == 0)
    line += 1;
    Line(line) = {1 + k, 3 + k};
  EndIf
  If (k < 4)
    line += 1;
    Line(line) = {1 + k, 5 + k};
  EndIf
EndFor
For k In {0 : 7}
  Line(13 + k) = {1 + k, 9};
EndFor
Line(21) = {8, 10};
Physical Curve("cube", 1) = {1 : 12};
Physical Curve("spokes", 2) = {13 : 20};
Physical Curve("tail", 3) = {21};
Physical Point("end", 4) = {10};
