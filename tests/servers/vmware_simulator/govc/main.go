// The commands for datastores of VMware's own client govc.
package main

import (
	"os"

	"github.com/vmware/govmomi/cli"
	_ "github.com/vmware/govmomi/cli/datastore"
)

func main() { os.Exit(cli.Run(os.Args[1:])) }
