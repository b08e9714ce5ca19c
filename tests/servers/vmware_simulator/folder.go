package main

import (
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
)

var errFull = errors.New("the datastore is full")

// folder is HTTP access to the files of a datastore, as the vendor's documents have it: it asks for a session or for
// Basic credentials, answers 201 for a file that is new, and refuses at once, while the client may still be sending.
func (g *gate) folder(plain http.ResponseWriter, r *http.Request) {
	w := &answer{ResponseWriter: plain}
	defer func() { g.note(r.Method, r.URL.Path, w.status, r) }()
	trouble := g.take(r.Method, r.URL.Path)
	switch trouble.Action {
	case "status":
		refuse(w, trouble.Status)
		return
	case "redirect":
		w.Header().Set("Location", trouble.Target)
		refuse(w, http.StatusFound)
		return
	case "drop", "stall", "lose":
		w.client, w.trouble = r, trouble
	}
	if user, password, basic := r.BasicAuth(); !g.session(r) && !(basic && user == g.user && password == g.password) {
		w.Header().Set("WWW-Authenticate", `Basic realm="datastores"`)
		refuse(w, http.StatusUnauthorized)
		return
	}
	query := r.URL.Query()
	key := strings.Trim(query.Get("dcPath"), "/") + "/" + query.Get("dsName")
	store := g.stores[key]
	if store == nil {
		refuse(w, http.StatusNotFound)
		return
	}
	if !store.Summary.Accessible {
		refuse(w, http.StatusServiceUnavailable)
		return
	}
	file := filepath.Join(store.Summary.Url, path.Clean("/"+strings.TrimPrefix(r.URL.Path, "/folder")))
	switch r.Method {
	case http.MethodPut:
		put(w, r, file, g.left(key), trouble)
	case http.MethodGet, http.MethodHead:
		get(w, r, file)
	default:
		refuse(w, http.StatusMethodNotAllowed)
	}
}

func refuse(w http.ResponseWriter, status int) {
	w.Header().Set("Connection", "close")
	w.WriteHeader(status)
}

func put(w *answer, r *http.Request, file string, room int64, trouble rule) {
	known, err := os.Stat(file)
	if err == nil && known.IsDir() {
		refuse(w, http.StatusMethodNotAllowed)
		return
	}
	_ = os.MkdirAll(filepath.Dir(file), 0o700)
	made, createErr := os.Create(file)
	if createErr != nil {
		refuse(w, http.StatusInternalServerError)
		return
	}
	defer made.Close()
	into := &limited{Writer: made, left: room}
	switch trouble.Action {
	case "drop", "stall", "lie":
		_, _ = io.CopyN(into, r.Body, trouble.After)
		switch trouble.Action {
		case "drop":
			reset(w)
			return
		case "stall":
			wait(r, trouble.Millis)
		case "lie":
			into.Writer, into.left = io.Discard, -1
		}
	}
	if _, err := io.Copy(into, r.Body); err != nil {
		refuse(w, http.StatusInternalServerError)
		return
	}
	if trouble.Action == "lose" {
		reset(w)
		return
	}
	if err == nil {
		w.WriteHeader(http.StatusOK)
	} else {
		w.WriteHeader(http.StatusCreated)
	}
}

// limited writes so many bytes, or all if there are less than none left.
type limited struct {
	io.Writer
	left int64
}

func (l *limited) Write(data []byte) (int, error) {
	if l.left < 0 {
		return l.Writer.Write(data)
	}
	part := data[:min(int64(len(data)), l.left)]
	l.left -= int64(len(part))
	written, err := l.Writer.Write(part)
	if err == nil && len(part) < len(data) {
		err = errFull
	}
	return written, err
}

func get(w http.ResponseWriter, r *http.Request, file string) {
	opened, err := os.Open(file)
	if err != nil {
		refuse(w, http.StatusNotFound)
		return
	}
	defer opened.Close()
	known, err := opened.Stat()
	if err != nil {
		refuse(w, http.StatusInternalServerError)
		return
	}
	if known.IsDir() {
		w.Header().Set("Content-Type", "text/html")
		names, _ := opened.Readdirnames(-1)
		for _, name := range names {
			fmt.Fprintf(w, "<a href=\"%[1]s\">%[1]s</a>\n", html.EscapeString(name))
		}
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", known.ModTime(), opened)
}

// answer notes its status, and breaks or stalls in the midst of a body.
type answer struct {
	http.ResponseWriter
	client  *http.Request
	trouble rule
	status  int
	sent    int64
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(data []byte) (int, error) {
	if a.client == nil || a.client.Method == http.MethodPut || a.sent+int64(len(data)) <= a.trouble.After {
		written, err := a.ResponseWriter.Write(data)
		a.sent += int64(written)
		return written, err
	}
	first := data[:max(0, a.trouble.After-a.sent)]
	_, _ = a.ResponseWriter.Write(first)
	_ = http.NewResponseController(a.ResponseWriter).Flush()
	if a.trouble.Action != "stall" {
		reset(a.ResponseWriter)
		return 0, io.ErrClosedPipe
	}
	wait(a.client, a.trouble.Millis)
	a.client = nil
	written, err := a.ResponseWriter.Write(data[len(first):])
	return len(first) + written, err
}
