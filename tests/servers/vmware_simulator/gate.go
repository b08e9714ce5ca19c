package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
)

const cookieName = "vmware_soap_session"

var operation = regexp.MustCompile(`<(?:\w+:)?Body[^>]*>\s*<(?:\w+:)?(\w+)`)

// Operations that need no session.
var free = map[string]bool{"RetrieveServiceContent": true, "Login": true, "Logout": true}

const faultText = `<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault>
<faultcode>ServerFaultCode</faultcode><faultstring>a fault</faultstring>
<detail><%[1]sFault xmlns="urn:vim25" xsi:type="%[1]s"></%[1]sFault></detail>
</soapenv:Fault></soapenv:Body></soapenv:Envelope>`

// rule is something that goes wrong, on so many requests as Count says (0: on all).
//
// Actions: status (answer with it and nothing else), redirect (to Target), fault (SOAP: a fault of that type), drop
// (reset the connection after so many bytes of a body; SOAP: at once), lose (do it, and reset instead of answering),
// lie (keep so many bytes of a PUT and say 201), stall (after so many bytes, until the client goes away or for
// Millis), logout (end all sessions first).
type rule struct {
	Method string `json:"method"` // PUT, GET, HEAD, SOAP:<operation>, or *
	Path   string `json:"path"`   // part of the URL's path
	Action string `json:"action"`
	Status int    `json:"status"`
	Target string `json:"target"`
	Fault  string `json:"fault"`
	After  int64  `json:"after"`
	Millis int    `json:"millis"`
	Count  int    `json:"count"`
	used   int
}

type entry struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Status int    `json:"status"`
	Cookie bool   `json:"cookie"`
}

type gate struct {
	service        *simulator.Service
	stores         map[string]*simulator.Datastore
	user, password string

	lock  sync.Mutex
	live  map[string]bool
	rules []*rule
	log   []entry
	rooms map[string]int64
}

func newGate(service *simulator.Service, stores map[string]*simulator.Datastore, user, password string) *gate {
	return &gate{
		service: service, stores: stores, user: user, password: password,
		live: map[string]bool{}, rooms: map[string]int64{},
	}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.HasPrefix(r.URL.Path, "/_ctl/"):
		g.control(w, r)
	case strings.HasPrefix(r.URL.Path, "/folder/"):
		g.folder(w, r)
	case r.URL.Path == "/sdk":
		g.sdk(w, r)
	default:
		g.service.ServeMux.ServeHTTP(w, r)
	}
}

// take gives the first rule for a request, or one that does nothing.
func (g *gate) take(method, path string) rule {
	g.lock.Lock()
	defer g.lock.Unlock()
	for _, one := range g.rules {
		if (one.Method == "*" || one.Method == method) && strings.Contains(path, one.Path) &&
			(one.Count == 0 || one.used < one.Count) {
			one.used++
			if one.Action == "logout" {
				clear(g.live)
			}
			return *one
		}
	}
	return rule{}
}

func (g *gate) note(method, path string, status int, r *http.Request) {
	g.lock.Lock()
	defer g.lock.Unlock()
	_, err := r.Cookie(cookieName)
	g.log = append(g.log, entry{method, path, status, err == nil})
}

// session says whether the request has the cookie of a session that lives.
func (g *gate) session(r *http.Request) bool {
	cookie, err := r.Cookie(cookieName)
	if err != nil {
		return false
	}
	g.lock.Lock()
	defer g.lock.Unlock()
	return g.live[strings.Trim(cookie.Value, `"`)]
}

func (g *gate) sdk(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	name := ""
	if found := operation.FindSubmatch(body); found != nil {
		name = string(found[1])
	}
	trouble := g.take("SOAP:"+name, r.URL.Path)
	status := http.StatusOK
	defer func() { g.note("SOAP:"+name, r.URL.Path, status, r) }()
	switch trouble.Action {
	case "status":
		status = trouble.Status
		w.WriteHeader(status)
		return
	case "fault":
		status = fault(w, trouble.Fault)
		return
	case "drop":
		reset(w)
		return
	case "stall":
		wait(r, trouble.Millis)
	}
	if !g.session(r) {
		if !free[name] {
			status = fault(w, "NotAuthenticated")
			return
		}
		r.Header.Del("Cookie")
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	answer := httptest.NewRecorder()
	g.service.ServeMux.ServeHTTP(answer, r)
	g.follow(name, answer, r)
	if trouble.Action == "lose" {
		reset(w)
		return
	}
	for key, values := range answer.Header() {
		w.Header()[key] = values
	}
	status = answer.Code
	w.WriteHeader(status)
	_, _ = w.Write(answer.Body.Bytes())
}

// follow keeps up with what an operation has changed.
func (g *gate) follow(name string, answer *httptest.ResponseRecorder, r *http.Request) {
	if answer.Code != http.StatusOK {
		return
	}
	switch name {
	case "Login":
		for _, cookie := range answer.Result().Cookies() {
			if cookie.Name == cookieName {
				g.lock.Lock()
				g.live[strings.Trim(cookie.Value, `"`)] = true
				g.lock.Unlock()
			}
		}
	case "Logout":
		if cookie, err := r.Cookie(cookieName); err == nil {
			g.lock.Lock()
			delete(g.live, strings.Trim(cookie.Value, `"`))
			g.lock.Unlock()
		}
	case "RefreshDatastore":
		for key := range g.stores {
			g.measure(key)
		}
	}
}

// left is how much may still be written where a room was set; else -1.
func (g *gate) left(key string) int64 {
	g.lock.Lock()
	room, limited := g.rooms[key]
	g.lock.Unlock()
	if !limited {
		return -1
	}
	_ = filepath.WalkDir(g.stores[key].Summary.Url, func(path string, entry os.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			if info, err := entry.Info(); err == nil {
				room -= info.Size()
			}
		}
		return nil
	})
	return max(room, 0)
}

// measure tells the simulator how much room there is, where one was set.
func (g *gate) measure(key string) {
	if left := g.left(key); left >= 0 {
		g.change(key, func(store *simulator.Datastore) {
			store.Summary.FreeSpace = left
			store.Info.GetDatastoreInfo().FreeSpace = left
		})
	}
}

func (g *gate) change(key string, how func(*simulator.Datastore)) {
	store := g.stores[key]
	ctx := &simulator.Context{Context: context.Background(), Map: g.service.Context.Map}
	ctx.WithLock(store, func() { how(store) })
}

// control takes orders from tests:
//
//	POST fault      a rule, as JSON
//	POST reset      forget rules, log and what was set on datastores
//	POST logout     end all sessions
//	POST datastore  ?key=DC0/LocalDS_0 and any of room=BYTES, accessible=, maintenance=
//	GET log, sessions
func (g *gate) control(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	switch strings.TrimPrefix(r.URL.Path, "/_ctl/") {
	case "fault":
		one := &rule{}
		if err := json.NewDecoder(r.Body).Decode(one); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		g.lock.Lock()
		g.rules = append(g.rules, one)
		g.lock.Unlock()
	case "reset":
		g.lock.Lock()
		g.rules, g.log, g.rooms = nil, nil, map[string]int64{}
		g.lock.Unlock()
		for key := range g.stores {
			g.change(key, func(store *simulator.Datastore) {
				store.Summary.Accessible, store.Summary.MaintenanceMode = true, "normal"
				store.Summary.FreeSpace = store.Summary.Capacity
			})
		}
	case "logout":
		g.lock.Lock()
		clear(g.live)
		g.lock.Unlock()
	case "datastore":
		key := query.Get("key")
		if g.stores[key] == nil {
			http.NotFound(w, r)
			return
		}
		if room, err := strconv.ParseInt(query.Get("room"), 10, 64); err == nil {
			g.lock.Lock()
			g.rooms[key] = room
			g.lock.Unlock()
			g.measure(key)
		}
		g.change(key, func(store *simulator.Datastore) {
			if text := query.Get("accessible"); text != "" {
				store.Summary.Accessible = text == "true"
			}
			if text := query.Get("maintenance"); text != "" {
				store.Summary.MaintenanceMode = text
			}
		})
	case "log":
		g.lock.Lock()
		defer g.lock.Unlock()
		_ = json.NewEncoder(w).Encode(append([]entry{}, g.log...))
	case "sessions":
		g.lock.Lock()
		defer g.lock.Unlock()
		fmt.Fprintln(w, len(g.live))
	default:
		http.NotFound(w, r)
	}
}

func fault(w http.ResponseWriter, name string) int {
	w.Header().Set("Content-Type", "text/xml")
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, faultText, name)
	return http.StatusInternalServerError
}

// wait lasts until the client goes away, or for so long.
func wait(r *http.Request, millis int) {
	select {
	case <-r.Context().Done():
	case <-time.After(time.Duration(millis) * time.Millisecond):
	}
}

// reset ends the connection so that the client sees an error, and not just an end.
func reset(w http.ResponseWriter) {
	connection, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if layered, ok := connection.(interface{ NetConn() net.Conn }); ok {
		connection = layered.NetConn()
	}
	if tcp, ok := connection.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = connection.Close()
}
