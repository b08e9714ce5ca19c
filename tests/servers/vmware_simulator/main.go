// A vCenter for tests, on the simulator library of VMware's govmomi: datacenters DC0 and DC1, datastores LocalDS_0 to
// LocalDS_2 in each, whose files are kept below -data and outlive the process.
//
// With -plain the library serves everything itself, as its own program vcsim does; it asks nobody who he is on
// /folder. Otherwise the library serves SOAP, behind a gate that checks sessions and takes faults (gate.go), and
// /folder follows the vendor's documents (folder.go).
package main

import (
	"context"
	"crypto/tls"
	"flag"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"syscall"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address")
	data := flag.String("data", "", "directory of the datastores")
	cert := flag.String("cert", "", "certificate, PEM")
	key := flag.String("key", "", "its key, PEM")
	user := flag.String("user", "", "who may log in")
	password := flag.String("password", "", "with what")
	ready := flag.String("ready", "", "file to write the address to")
	plain := flag.Bool("plain", false, "nothing but the library")
	flag.Parse()

	pair, err := tls.LoadX509KeyPair(*cert, *key)
	must(err)
	model := simulator.VPX()
	model.Datacenter, model.Datastore, model.Machine = 2, 3, 0
	must(model.Create())
	service := model.Service
	stores, err := datastores(service, *data)
	must(err)
	service.RegisterEndpoints = true
	service.Listen = &url.URL{Host: *listen, User: url.UserPassword(*user, *password)}

	if *plain {
		service.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
		server := service.NewServer()
		tell(*ready, server.URL.Host)
	} else {
		listener, err := net.Listen("tcp", *listen)
		must(err)
		// Only its routes are wanted: its own socket, with a /folder that is open to all, is closed at once.
		service.Listen.Host = "127.0.0.1:0"
		service.NewServer().Close()
		handler := newGate(service, stores, *user, *password)
		server := &http.Server{
			Handler:      handler,
			TLSConfig:    &tls.Config{Certificates: []tls.Certificate{pair}},
			TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
			ErrorLog:     log.New(quiet{}, "", 0),
		}
		go func() { log.Fatal(server.ServeTLS(listener, "", "")) }()
		tell(*ready, listener.Addr().String())
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	<-stop
	model.Remove()
}

// quiet drops what net/http says of clients that break off, which is what tests do.
type quiet struct{}

func (quiet) Write(text []byte) (int, error) { return len(text), nil }

// datastores moves those of the model below data, and gives them by datacenter and name.
func datastores(service *simulator.Service, data string) (map[string]*simulator.Datastore, error) {
	ctx := context.Background()
	client, err := vim25.NewClient(ctx, service)
	if err != nil {
		return nil, err
	}
	finder := find.NewFinder(client, false)
	centers, err := finder.DatacenterList(ctx, "*")
	if err != nil {
		return nil, err
	}
	found := map[string]*simulator.Datastore{}
	for _, center := range centers {
		finder.SetDatacenter(center)
		stores, err := finder.DatastoreList(ctx, "*")
		if err != nil {
			return nil, err
		}
		for _, store := range stores {
			dc, name := path.Base(center.InventoryPath), path.Base(store.InventoryPath)
			place := filepath.Join(data, dc, name)
			if err := os.MkdirAll(place, 0o700); err != nil {
				return nil, err
			}
			made := service.Context.Map.Get(store.Reference()).(*simulator.Datastore)
			made.Summary.Url = place
			made.Info.GetDatastoreInfo().Url = place
			if plain, ok := service.Context.Map.Get(made.Browser).(*simulator.HostDatastoreBrowser); ok {
				service.Context.Map.Put(&browser{plain})
			}
			found[dc+"/"+name] = made
		}
	}
	return found, nil
}

// browser lets a search and the tasks that move and delete files take turns.
type browser struct {
	*simulator.HostDatastoreBrowser
}

func (b *browser) SearchDatastoreTask(ctx *simulator.Context, request *types.SearchDatastore_Task) (body soap.HasFault) {
	ctx.WithLock(ctx.Map.FileManager(), func() {
		body = b.HostDatastoreBrowser.SearchDatastoreTask(ctx, request)
		started := body.(*methods.SearchDatastore_TaskBody).Res.Returnval
		ctx.Map.Get(started).(*simulator.Task).Wait()
	})
	return body
}

func tell(file, address string) {
	must(os.WriteFile(file+".new", []byte(address), 0o600))
	must(os.Rename(file+".new", file))
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
