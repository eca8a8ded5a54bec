package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"slices"
	"strings"
	"time"
)

//go:embed picture.html
var pictureText string

var pictureTemplate = template.Must(template.New("picture").Parse(pictureText))

// picture is what the template draws: a lane for each worker and one for the servers, and bars in them.
type picture struct {
	Title, Text string
	Lanes       []label
	Width       int
	Height      int
	Bars        []bar
	Ticks       []label
	Events      []event
}

// bar is a span in a lane: a belief, or a fault.
type bar struct {
	X, Y, Width, Height int
	Class, Tip          string
}

type label struct {
	X, Y int
	Text string
}

const (
	pictureWidth = 1400
	laneHeight   = 34
)

// draw makes an HTML page of what happened round a violation.
func draw(v *violation, r *run, events []event) []byte {
	p := picture{Title: r.target.name + ": " + v.Kind, Text: v.Text, Width: pictureWidth + 20, Height: (r.Processes + 2) * laneHeight}
	if len(events) == 0 {
		return nil
	}
	from, to := events[0].At, events[0].At
	for _, e := range events {
		from, to = min(from, e.At), max(to, e.At)
	}
	x := func(at time.Duration) int { return int(int64(pictureWidth) * int64(at-from) / int64(to-from+1)) }
	add := func(lane, top, height int, begin, end time.Duration, class, tip string) {
		p.Bars = append(p.Bars, bar{X: x(begin), Y: lane*laneHeight + top, Width: max(2, x(end)-x(begin)), Height: height, Class: class, Tip: tip})
	}
	for step := 0; step <= 10; step++ {
		at := from + (to-from)*time.Duration(step)/10
		p.Ticks = append(p.Ticks, label{x(at), p.Height - 4, fmt.Sprintf("%.3f s", at.Seconds())})
	}
	for lane := range r.Processes + 1 {
		p.Lanes = append(p.Lanes, label{4, lane*laneHeight + 16, fmt.Sprint("worker ", lane)})
	}
	p.Lanes[0].Text = "servers"
	ends := func(e event, end func(event) bool) time.Duration {
		i := slices.IndexFunc(events, func(f event) bool { return f.Worker == e.Worker && f.At >= e.At && end(f) })
		if i < 0 {
			return to
		}
		return events[i].At
	}
	for _, e := range events {
		switch {
		case e.Kind == kindAcquired:
			end := ends(e, func(f event) bool {
				return f.Kind == kindBelieved && f.Lock == e.Lock && f.Life == e.Life || f.Kind == kindEnded && f.Life == e.Life
			})
			class := fmt.Sprint("key", slices.Index(r.keys, e.Key)%6)
			if slices.Contains(v.Holds, hold{e.Worker, e.Life, e.Lock}) {
				class += " guilty"
			}
			add(e.Worker, 4, 14, e.At, end, class, e.String())
		case e.Kind == kindFault && (e.Text == "stop" || e.Text == "kill"):
			add(e.Worker, 20, 4, e.At, ends(e, func(f event) bool {
				return f.Kind == kindFault && (f.Text == "continue" || f.Text == "start")
			}), e.Text, e.Text)
		case e.Kind == kindFault && e.Worker == 0:
			what, who, _ := strings.Cut(e.Text, " ")
			if what == "pause" || what == "crash" || what == "restart" {
				add(0, 4, 20, e.At, ends(e, func(f event) bool {
					return f.Kind == kindHeal || f.Kind == kindFault && (f.Text == "resume "+who || f.Text == "start "+who)
				}), "server", e.Text)
			}
		case e.Kind == kindFault && strings.HasPrefix(e.Text, "link: "):
			what := strings.TrimPrefix(e.Text, "link: ")
			if slices.Contains([]string{"cut", "hang", "delay", "reset"}, what) {
				add(e.Worker, 26, 4, e.At, ends(e, func(f event) bool {
					return f.Kind == kindFault && f.At > e.At && strings.HasPrefix(f.Text, "link: ")
				}), "link", e.Text)
			}
		}
		if v.tells(e) {
			p.Events = append(p.Events, e)
		}
	}
	var page bytes.Buffer
	if err := pictureTemplate.Execute(&page, p); err != nil {
		return []byte(err.Error())
	}
	return page.Bytes()
}
