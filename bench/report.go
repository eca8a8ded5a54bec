package main

import (
	"fmt"
	"html"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

// table prints the results of one scenario.
func table(out io.Writer, results []result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	heading := ""
	var we float64
	for _, r := range results {
		if h := r.heading(); h != heading {
			heading, we = h, r.median()
			fmt.Fprintf(w, "\n%s\n", h)
		}
		if r.Error != "" {
			fmt.Fprintf(w, "  %s\tcannot\t\t%s\n", r.Peer, r.Error)
			continue
		}
		ratio := ""
		if theirs := r.median(); theirs > 0 && we > 0 {
			ratio = fmt.Sprintf("locker / it: %.2f", we/theirs)
		}
		spread := ""
		if !math.IsNaN(r.median()) {
			spread = fmt.Sprintf("(%.4g to %.4g)", r.percentile(0), r.percentile(100))
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\t%s\n", r.Peer, r.text(), spread, ratio)
	}
	return w.Flush()
}

func (r result) heading() string {
	better := "more is better"
	if r.lessIsMore {
		better = "less is better"
	}
	return fmt.Sprintf("%s, %s: %s (%s)", r.Server, r.Scenario, r.Figure, better)
}

// text is the median for people.
func (r result) text() string {
	if math.IsNaN(r.median()) {
		return "never"
	}
	return strings.TrimSpace(fmt.Sprintf("%.4g %s", r.median(), r.Unit))
}

// plot draws the results of one scenario: a bar for each peer's median, and a line for the spread over the rounds.
func plot(folder string, results []result) error {
	const width, label, bars, line = 820, 150, 480, 22
	var b strings.Builder
	y, heading, most := 10, "", 0.0
	for i, r := range results {
		if h := r.heading(); h != heading {
			heading, most = h, 0
			for _, other := range results[i:] {
				if other.heading() == h && other.Error == "" {
					most = max(most, other.percentile(100))
				}
			}
			y += 2 * line
			fmt.Fprintf(&b, `<text x="8" y="%d" font-weight="bold">%s</text>`+"\n", y-8, html.EscapeString(h))
		}
		color, text := "#8a94a6", r.text()
		if r.Peer == ours {
			color = "#2563eb"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", label-8, y+15, html.EscapeString(r.Peer))
		scale := func(v float64) float64 { return max(0, v) / most * bars }
		switch median := r.median(); {
		case r.Error != "":
			text = "cannot"
		case most > 0 && !math.IsNaN(median):
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", label, y+3, scale(median), line-7, color)
			fmt.Fprintf(&b, `<path d="M%.1f %dH%.1f" stroke="#111" stroke-width="2"/>`+"\n",
				label+scale(r.percentile(0)), y+10, label+scale(r.percentile(100)))
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d">%s</text>`+"\n", label+bars+10, y+15, html.EscapeString(text))
		y += line
	}
	picture := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">`+"\n"+
		`<rect width="100%%" height="100%%" fill="#fff"/>`+"\n%s</svg>\n", width, y+10, b.String())
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(results[0].Server+"-"+strings.ReplaceAll(results[0].Scenario, ",", "")))
	return os.WriteFile(filepath.Join(folder, name+".svg"), []byte(picture), 0o644)
}
