package main

import (
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"os"
	"slices"
	"strings"
	"time"
)

//go:embed picture.html
var pictureText string

var pictureTemplate = template.Must(template.New("picture").Parse(pictureText))

// picture is what the template draws: a lane for each worker and one for the servers, and bars in them.
type picture struct {
	Title, Text   string
	Width, Height int
	Bars          []bar
	Labels        []label
	Events        []event
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

// draw writes an HTML page of what happened round a violation. The events are in the order of time.
func draw(path string, v *violation, r *run, events, telling []event) error {
	const width, lane = 1400, 34
	p := picture{Title: r.target.name + ": " + v.Kind, Text: v.Text, Width: width + 20, Height: (r.Processes + 2) * lane, Events: telling}
	from, to := max(0, v.From-time.Second), v.To+time.Second
	x := func(at time.Duration) int { return int(width * (at - from).Seconds() / (to - from).Seconds()) }
	for i := range 11 {
		at := from + (to-from)*time.Duration(i)/10
		p.Labels = append(p.Labels, label{x(at), p.Height - 4, fmt.Sprintf("%.3f s", at.Seconds())})
	}
	for i := range r.Processes + 1 {
		p.Labels = append(p.Labels, label{4, i*lane + 16, []string{"servers", workerName(i)}[min(i, 1)]})
	}
	for i, e := range events {
		b := bar{X: x(e.At), Y: e.Worker*lane + 4, Height: 14, Tip: e.String()}
		var over func(event) bool
		fault, _, _ := strings.Cut(e.Text, " ")
		switch {
		case e.Kind == kindAcquired:
			b.Class = fmt.Sprint("key", slices.Index(r.keys, e.Key)%6)
			if slices.Contains(v.Holds, hold{e.Worker, e.Life, e.Lock}) {
				b.Class += " guilty"
			}
			over = func(f event) bool { return f.Kind == kindBelieved && f.Lock == e.Lock || f.Kind == kindEnded }
		case e.Kind == kindFault && !strings.HasPrefix(e.Text, endOf):
			b.Class, b.Y, b.Height = fault, b.Y+16, 8
			over = func(f event) bool { return f.Kind == kindFault && f.Text == endOf+e.Text }
		default:
			continue
		}
		end := to
		if n := slices.IndexFunc(events[i:], func(f event) bool { return f.Worker == e.Worker && over(f) }); n >= 0 {
			end = events[i+n].At
		}
		b.Width = max(2, x(end)-b.X)
		p.Bars = append(p.Bars, b)
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(pictureTemplate.Execute(file, p), file.Close())
}
